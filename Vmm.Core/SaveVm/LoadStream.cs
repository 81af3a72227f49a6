using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.Wire;

namespace Vmm.Core.SaveVm;

/// <summary>
/// One attempt's loading half: makes the object of every section and gives each body to it (stream 1; QEMU: <c>qemu_loadvm_state_main</c>). The bytes
/// are those that <see cref="SaveStream"/> draws. One thread. FULL sections load under the BQL, the parts of iterables without it.
/// </summary>
/// <param name="registry">The VM's sections.</param>
/// <param name="f">The stream.</param>
/// <param name="context">What the attempt is asked to do.</param>
public sealed class LoadStream(SaveVmRegistry registry, QemuFileReader f, LoadContext context)
{
    private readonly Dictionary<uint, (SaveVmEntry Entry, int VersionId)> _bound = [];
    private readonly List<(SaveVmEntry Entry, LoadRoles Roles)> _attempts = [];
    private readonly HashSet<SaveVmEntry> _begun = [];

    /// <summary>What the attempt is asked to do.</summary>
    public LoadContext Context => context;

    /// <summary>Reads the body of a COMMAND section, whose type byte has been read; null where the stream may have none.</summary>
    public Action? ReadCommand { get; init; }

    /// <summary>Called before each section that only a stopped source sends.</summary>
    public Action? OnSwitchover { get; init; }

    /// <summary>Sections that have had a START or FULL.</summary>
    public IEnumerable<SaveVmEntry> Announced => _bound.Values.Select(static b => b.Entry);

    /// <summary>How many devices will acknowledge their first data.</summary>
    public int SwitchoverAcksNeeded => _attempts.Count(static a => a.Roles.NeedsSwitchoverAck);

    /// <summary>The sections that take part; null for all.</summary>
    internal Func<SaveVmEntry, bool>? Only { get; init; }

    private Bql Bql => registry.Bql;

    private IEnumerable<SaveVmEntry> Entries => Only is null ? registry.Entries() : registry.Entries().Where(Only);

    /// <summary>Begins the attempt: every active section makes its object (QEMU: <c>qemu_loadvm_state_setup</c>). Takes the BQL.</summary>
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

    /// <summary>The object of that type that a section made for this attempt, or null.</summary>
    /// <typeparam name="T">Type of the object behind a role.</typeparam>
    /// <returns>The object.</returns>
    public T? Find<T>() where T : class
    {
        foreach ((_, LoadRoles roles) in _attempts)
        {
            if ((roles.State as T ?? roles.VmState as T ?? roles.Pages as T) is { } found) return found;
        }
        return null;
    }

    /// <summary>Who takes pages from data channels; null when nobody does.</summary>
    internal ILoadPages? Pages => _attempts.Select(static a => a.Roles.Pages).FirstOrDefault(static p => p is not null);

    /// <summary>Who takes device state from data channels for a section; null when nobody does.</summary>
    /// <param name="idStr">Section name from a packet.</param>
    /// <param name="instanceId">Instance id from a packet.</param>
    /// <returns>The role.</returns>
    public ILoadStateBuffer? FindBuffers(string idStr, int instanceId) =>
        registry.Find(idStr, instanceId) is { } entry ? _attempts.Find(a => a.Entry == entry).Roles?.Buffers : null;

    /// <summary>Everybody who takes device state from data channels.</summary>
    /// <returns>The roles.</returns>
    public IEnumerable<ILoadStateBuffer> AllBuffers() => _attempts.Select(static a => a.Roles.Buffers).OfType<ILoadStateBuffer>();

    /// <summary>Sections and commands up to EOF.</summary>
    /// <exception cref="VmmException">The stream is malformed or does not fit this machine.</exception>
    public void ReadSections()
    {
        while (ReadSection()) { }
    }

    /// <summary>Reads one section or command.</summary>
    /// <returns>False at EOF, which has been read.</returns>
    /// <exception cref="VmmException">The stream is malformed or does not fit this machine.</exception>
    public bool ReadSection()
    {
        f.Section = "framing";
        var type = (SectionType)f.ReadByte();
        switch (type)
        {
            case SectionType.Eof: return false;
            case SectionType.Start or SectionType.Full: ReadFirst(type); return true;
            case SectionType.Part or SectionType.End: ReadNext(type); return true;
            case SectionType.Command when ReadCommand is not null: ReadCommand(); return true;
            default: throw f.Bad("section type", ReadCommand is null ? "START, PART, END, FULL or EOF" : "START, PART, END, FULL, COMMAND or EOF", $"0x{(byte)type:x2}");
        }
    }

    /// <summary>Nothing may run on half a state: every section that was begun has all of it. Call at the end of stream and data channels. BQL: not held.</summary>
    /// <exception cref="VmmException">Something never came; names it.</exception>
    public void ThrowIfIncomplete()
    {
        foreach ((SaveVmEntry entry, LoadRoles roles) in _attempts)
        {
            if (roles.Complete is { } complete) complete.ThrowIfIncomplete();
            else if (_begun.Contains(entry)) throw f.Bad("end of the stream", $"an END section of '{entry}' first", "EOF");
        }
    }

    /// <summary>The source has stopped its VM (QEMU: <c>qemu_loadvm_state_switchover_start</c>). Takes the BQL.</summary>
    public void SwitchoverStart()
    {
        using (Bql.Acquire())
            foreach (ILoadStateBuffer buffers in AllBuffers()) buffers.SwitchoverStart();
    }

    /// <summary>Ends every section's part in the attempt, well or not (QEMU: <c>qemu_loadvm_state_cleanup</c>). Takes the BQL.</summary>
    /// <exception cref="Exception">What a section threw although it must not; the others have had their call.</exception>
    public void LoadCleanup()
    {
        using (Bql.Acquire()) Each.Call(_attempts, static a => a.Roles.Cleanup?.LoadCleanup());
        _attempts.Clear();
    }

    private void ReadFirst(SectionType type)
    {
        uint id = f.ReadUInt32();
        string idStr = f.ReadCountedString();
        uint instance = f.ReadUInt32();
        uint version = f.ReadUInt32();
        f.Section = $"{idStr}/{instance}";
        SaveVmEntry entry = registry.Find(idStr, (int)instance)
            ?? throw new IncompatibleStateException($"unknown section '{idStr}' instance {instance}: this machine has no such device")
            {
                Section = f.Section, Offset = f.Position, Found = f.Section, Hint = $"give both sides the same devices; here: {string.Join(", ", registry.Entries())}",
            };
        if (version > entry.VersionId) throw BadVersion(entry, version, $"version {version} is newer than {entry.VersionId}");
        if (version < entry.MinimumVersionId) throw BadVersion(entry, version, $"version {version} is older than {entry.MinimumVersionId}");
        if (_bound.TryGetValue(id, out (SaveVmEntry Entry, int) other) && other.Entry != entry)
            throw f.Bad("section id", $"an id that '{other.Entry}' does not use", id.ToString());
        _bound[id] = (entry, (int)version);
        if (type == SectionType.Start) _begun.Add(entry);
        ReadBody(entry, type, (int)version);
        ReadFooter(id);
    }

    private void ReadNext(SectionType type)
    {
        uint id = f.ReadUInt32();
        if (!_bound.TryGetValue(id, out (SaveVmEntry Entry, int VersionId) bound)) throw f.Bad("section id", "the id of a START section", id.ToString());
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
        if (state is null && roles?.State is null) throw new IncompatibleStateException($"section '{entry}' cannot be loaded here") { Section = f.Section, Offset = f.Position };
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
        if (mark != (byte)SectionType.Footer) throw f.Bad("section footer", "0x7e", $"0x{mark:x2}");
        uint found = f.ReadUInt32();
        if (found != id) throw f.Bad("section id in footer", id.ToString(), found.ToString());
    }

    private IncompatibleStateException BadVersion(SaveVmEntry entry, uint found, string why) => new($"section '{entry}': {why}, which this machine has")
    {
        Section = f.Section, Offset = f.Position, Expected = $"{entry.MinimumVersionId}..{entry.VersionId}", Found = found.ToString(),
    };
}
