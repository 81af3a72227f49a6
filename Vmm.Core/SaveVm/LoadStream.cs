using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.Wire;

namespace Vmm.Core.SaveVm;

/// <summary>
/// The sections of one attempt to load: makes the object of every section and gives each body to it (stream 1; QEMU: <c>qemu_loadvm_state_main</c>).
/// <see cref="SaveStream"/> draws the bytes. One thread uses it; between setup and cleanup others may look objects up. FULL sections load with the BQL held,
/// the parts of iterables without it.
/// </summary>
public sealed class LoadStream(SaveVmRegistry registry, QemuFileReader f, LoadContext context)
{
    private readonly Dictionary<uint, (SaveVmEntry Entry, int VersionId)> _bound = [];
    private readonly List<(SaveVmEntry Entry, LoadRoles Roles)> _attempts = [];
    private readonly HashSet<SaveVmEntry> _begun = [];

    /// <summary>What the attempt is asked to do.</summary>
    public LoadContext Context => context;

    /// <summary>Reads a COMMAND section after its type byte; null where the stream may have none.</summary>
    public Action? ReadCommand { get; init; }

    /// <summary>Called before each END and FULL section, which only a stopped source sends. BQL: not held.</summary>
    public Action? OnSwitchover { get; init; }

    /// <summary>Sections whose START or FULL has been read.</summary>
    public IEnumerable<SaveVmEntry> Announced => _bound.Values.Select(static b => b.Entry);

    /// <summary>How many devices will acknowledge their first data.</summary>
    public int SwitchoverAcksNeeded => _attempts.Count(static a => a.Roles.NeedsSwitchoverAck);

    /// <summary>The sections that take part; null for all.</summary>
    internal Func<SaveVmEntry, bool>? Only { get; init; }

    private Bql Bql => registry.Bql;

    private IEnumerable<SaveVmEntry> Entries => Only is null ? registry.Entries() : registry.Entries().Where(Only);

    /// <summary>
    /// Begins the attempt: every active section makes its object (QEMU: <c>qemu_loadvm_state_setup</c>). Call <see cref="LoadCleanup"/> also when this throws.
    /// Takes the BQL.
    /// </summary>
    /// <exception cref="VmmException">A section cannot begin.</exception>
    public void LoadSetup()
    {
        using (Bql.Acquire())
        {
            foreach (SaveVmEntry entry in Entries)
            {
                if (entry.Handlers is not { Load: { } load } handlers || handlers.IsActive is { } active && !active()) continue;
                f.Section = entry.ToString();
                _attempts.Add((entry, load.LoadSetup(context)));
            }
        }
    }

    /// <summary>The object of type <typeparamref name="T"/> that a section made for this attempt, or null.</summary>
    public T? Find<T>() where T : class
    {
        foreach ((_, LoadRoles roles) in _attempts)
        {
            if ((roles.State as T ?? roles.VmState as T ?? roles.Pages as T) is { } found) return found;
        }
        return null;
    }

    /// <summary>The object that takes pages from data channels, or null.</summary>
    internal ILoadPages? Pages => _attempts.Select(static a => a.Roles.Pages).FirstOrDefault(static p => p is not null);

    /// <summary>The object that takes device state from data channels for the section that a packet names, or null. Any thread.</summary>
    public ILoadStateBuffer? FindBuffers(string idStr, int instanceId) =>
        registry.Find(idStr, instanceId) is { } entry ? _attempts.Find(a => a.Entry == entry).Roles?.Buffers : null;

    /// <summary>All objects that take device state from data channels. Any thread.</summary>
    public IEnumerable<ILoadStateBuffer> AllBuffers() => _attempts.Select(static a => a.Roles.Buffers).OfType<ILoadStateBuffer>();

    /// <summary>Reads sections and commands up to EOF. BQL: not held, unless all sections are FULL.</summary>
    /// <exception cref="VmmException">The stream is malformed or does not fit this machine.</exception>
    public void ReadSections()
    {
        while (ReadSection()) { }
    }

    /// <summary>Reads one section or command. BQL: as for <see cref="ReadSections"/>.</summary>
    /// <returns>False when it was EOF.</returns>
    /// <exception cref="VmmException">The stream is malformed or does not fit this machine.</exception>
    public bool ReadSection()
    {
        f.Section = "framing";
        long at = f.Position;
        var type = (SectionType)f.ReadByte();
        switch (type)
        {
            case SectionType.Eof: return false;
            case SectionType.Start or SectionType.Full: ReadFirst(type, at); return true;
            case SectionType.Part or SectionType.End: ReadNext(type); return true;
            case SectionType.Command when ReadCommand is not null: ReadCommand(); return true;
            default: throw f.Bad("section type", ReadCommand is null ? "START, PART, END, FULL or EOF" : "START, PART, END, FULL, COMMAND or EOF", $"0x{(byte)type:x2}", at);
        }
    }

    /// <summary>
    /// Checks that every section that was begun has all of its state, so that no VM runs on half of it. Call when stream and data channels have ended. BQL: not
    /// held.
    /// </summary>
    /// <exception cref="VmmException">Names what never came.</exception>
    public void ThrowIfIncomplete()
    {
        foreach ((SaveVmEntry entry, LoadRoles roles) in _attempts)
        {
            roles.State?.ThrowIfIncomplete();
            if (_begun.Contains(entry) && roles.State is not { NeedsNoEnd: true }) throw f.Bad("end of the stream", $"an END section of '{entry}' first", "EOF");
        }
    }

    /// <summary>Tells the devices that the source has stopped its VM (QEMU: <c>qemu_loadvm_state_switchover_start</c>). Takes the BQL.</summary>
    public void SwitchoverStart()
    {
        using (Bql.Acquire())
            foreach (ILoadStateBuffer buffers in AllBuffers()) buffers.SwitchoverStart();
    }

    /// <summary>Ends the attempt of every section, successful or not (QEMU: <c>qemu_loadvm_state_cleanup</c>). Takes the BQL.</summary>
    /// <exception cref="Exception">A section threw although it must not; the others were cleaned up all the same.</exception>
    public void LoadCleanup()
    {
        using (Bql.Acquire()) Each.Call(_attempts, static a => a.Roles.Cleanup?.LoadCleanup());
        _attempts.Clear();
    }

    private void ReadFirst(SectionType type, long at)
    {
        uint id = f.ReadUInt32();
        string idStr = f.ReadCountedString();
        uint instance = f.ReadUInt32();
        uint version = f.ReadUInt32();
        f.Section = $"{idStr}/{instance}";
        SaveVmEntry entry = registry.Find(idStr, (int)instance)
            ?? throw new IncompatibleStateException($"unknown section '{idStr}' instance {instance}: this machine has no such device")
            {
                Section = f.Section, Offset = at, Found = f.Section, Hint = $"give both sides the same devices; here: {string.Join(", ", registry.Entries())}",
            };
        if (version > entry.VersionId) throw BadVersion(entry, version, $"version {version} is newer than {entry.VersionId}");
        if (version < entry.MinimumVersionId) throw BadVersion(entry, version, $"version {version} is older than {entry.MinimumVersionId}");
        if (_bound.TryGetValue(id, out (SaveVmEntry Entry, int) other) && other.Entry != entry)
            throw f.Bad("section id", $"an id that '{other.Entry}' does not use", id.ToString(), at + 1);
        if (_bound.Count == WireLimits.SectionIds && !_bound.ContainsKey(id))
            throw new StreamLimitException($"section '{entry}', offset {f.Position}: more than {WireLimits.SectionIds} section ids (WireLimits.SectionIds)");
        _bound[id] = (entry, (int)version);
        if (type == SectionType.Start) _begun.Add(entry);
        ReadBody(entry, type, (int)version);
        ReadFooter(id);
    }

    private void ReadNext(SectionType type)
    {
        uint id = f.ReadUInt32();
        if (!_bound.TryGetValue(id, out (SaveVmEntry Entry, int VersionId) bound)) throw f.Bad("section id", "the id of a START section", id.ToString(), f.Position - 4);
        f.Section = bound.Entry.ToString();
        ReadBody(bound.Entry, type, bound.VersionId);
        ReadFooter(id);
        if (type == SectionType.End) _begun.Remove(bound.Entry);
    }

    private void ReadBody(SaveVmEntry entry, SectionType type, int version)
    {
        if (type is SectionType.End or SectionType.Full) OnSwitchover?.Invoke();
        LoadRoles? roles = _attempts.Find(a => a.Entry == entry).Roles;
        IVmStateSection? state = entry.VmState ?? roles?.VmState;
        if (state is null && roles?.State is null)
        {
            throw new IncompatibleStateException($"section '{entry}', offset {f.Position}: the device here takes no {type.ToString().ToUpperInvariant()} section now")
            {
                Section = f.Section, Offset = f.Position, Found = type.ToString().ToUpperInvariant(), Hint = "give the device the same options and capabilities on both sides",
            };
        }
        try
        {
            if (state is null && type != SectionType.Full)
            {
                Bql.AssertNotHeld();
                roles!.State!.LoadState(f, version);
                return;
            }
            using (Bql.Acquire())
            {
                if (state is not null) state.Load(f, version);
                else roles!.State!.LoadState(f, version);
            }
        }
        catch (Exception e) when (e is not (VmmException or OperationCanceledException))
        {
            throw new DeviceStateException($"device '{entry.IdStr}' failed to load at offset {f.Position}: {e.Message}", e);
        }
    }

    private void ReadFooter(uint id)
    {
        if (!context.Compat.SendSectionFooter) return;
        byte mark = f.ReadByte();
        if (mark != (byte)SectionType.Footer) throw f.Bad("section footer", "0x7e", $"0x{mark:x2}", f.Position - 1);
        uint found = f.ReadUInt32();
        if (found != id) throw f.Bad("section id in footer", id.ToString(), found.ToString(), f.Position - 4);
    }

    private IncompatibleStateException BadVersion(SaveVmEntry entry, uint found, string why) => new($"section '{entry}': {why}, which this machine has")
    {
        Section = f.Section, Offset = f.Position - 4, Expected = $"{entry.MinimumVersionId} to {entry.VersionId}", Found = found.ToString(),
    };
}
