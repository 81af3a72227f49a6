using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.Threading;
using Vmm.Core.Wire;

namespace Vmm.Core.SaveVm;

/// <summary>
/// The sections of one attempt to save: makes the object of every section and writes headers and footers around the bodies in QEMU's order (stream 1.3).
/// Migrations, snapshots, rehearsals and the state of served devices are all written here. One thread uses it; devices that send over data channels get
/// threads of their own.
/// <code>
/// { u8 1 START | 4 FULL, be32 section id, counted string name, be32 instance, be32 version, body, footer }
/// { u8 2 PART | 3 END, be32 section id, body, footer }
/// footer: u8 0x7e, be32 section id
/// u8 0 EOF
/// </code>
/// </summary>
public sealed class SaveStream(SaveVmRegistry registry, QemuFileWriter f, SaveContext context)
{
    private readonly List<(SaveVmEntry Entry, SaveRoles Roles)> _attempts = [];
    private readonly List<Task> _threads = [];

    /// <summary>What the attempt is asked to do.</summary>
    public SaveContext Context => context;

    /// <summary>The section being saved, for error records; null between sections.</summary>
    public string? Section { get; private set; }

    /// <summary>Description of the FULL sections written so far, for VMDESC.</summary>
    internal VmDescJson FullSections { get; } = new(context.Compat.LegacyDescriptions ? VmDescOptions.Qemu72 : VmDescOptions.Qemu111);

    /// <summary>True when a device sends its final state over data channels.</summary>
    public bool UsesThreads => _attempts.Exists(static a => a.Roles.CompleteThread is not null);

    /// <summary>The sections that take part; null for all.</summary>
    internal Func<SaveVmEntry, bool>? Only { get; init; }

    private Bql Bql => registry.Bql;

    private IEnumerable<SaveVmEntry> Entries => Only is null ? registry.Entries() : registry.Entries().Where(Only);

    /// <summary>
    /// Begins the attempt: every active section makes its object or refuses (QEMU: <c>qemu_savevm_state_prepare</c>). Call <see cref="SaveCleanup"/> also when
    /// this throws. BQL: held.
    /// </summary>
    /// <exception cref="MigrationBlockedException">A device cannot be saved at all.</exception>
    /// <exception cref="VmmException">A section refused.</exception>
    public void SavePrepare()
    {
        Bql.AssertHeld();
        foreach (SaveVmEntry entry in Entries)
        {
            if (entry.VmState is { IsMigratable: false }) throw new MigrationBlockedException($"device '{entry.IdStr}' is not migratable");
            if (entry.Handlers is not { Save: { } save } handlers || handlers.IsActive is { } active && !active()) continue;
            Guard(entry, () => _attempts.Add((entry, save.SavePrepare(context))));
        }
        Section = null;
    }

    /// <summary>The object of type <typeparamref name="T"/> that a section made for this attempt, or null.</summary>
    public T? Find<T>() where T : class
    {
        foreach ((_, SaveRoles roles) in _attempts)
        {
            if ((roles.Live as T ?? roles.VmState as T ?? roles.State as T ?? roles.Setup as T) is { } found) return found;
        }
        return null;
    }

    /// <summary>Writes the early FULL sections, then the START section of every iterable (QEMU: <c>qemu_savevm_state_setup</c>). BQL: held.</summary>
    /// <exception cref="VmmException">A section or the channel failed; <see cref="Section"/> says which.</exception>
    public void SaveSetup()
    {
        Bql.AssertHeld();
        foreach (SaveVmEntry entry in Entries)
            if (entry.VmState is { IsEarlySetup: true } state) WriteFull(entry, state, null);
        foreach ((SaveVmEntry entry, SaveRoles roles) in Iterables())
        {
            WriteHeader(entry, SectionType.Start);
            Guard(entry, () => roles.Setup?.SaveSetup(f));
            WriteFooter(entry);
        }
    }

    /// <summary>What all iterables have left, from figures at hand. BQL: not held.</summary>
    public PendingBytes EstimatePending()
    {
        Bql.AssertNotHeld();
        return Sum(static live => live.EstimatePending());
    }

    /// <summary>What all iterables have left, after a synchronisation with all sources. Takes the BQL.</summary>
    /// <exception cref="VmmException">A section failed.</exception>
    public PendingBytes ExactPending()
    {
        using (Bql.Acquire()) return Sum(static live => live.ExactPending());
    }

    /// <summary>
    /// Writes one PART section of every iterable that has something to send, until the budget is used up (QEMU: <c>qemu_savevm_state_iterate</c>).
    /// BQL: not held.
    /// </summary>
    /// <exception cref="VmmException">A section or the channel failed.</exception>
    public SaveProgress SaveLiveIterate(IterateBudget budget)
    {
        Bql.AssertNotHeld();
        foreach ((SaveVmEntry entry, SaveRoles roles) in Iterables())
        {
            if (roles.Live is not { IsActiveIterate: true } live) continue;
            WriteShortHeader(entry, SectionType.Part);
            SaveProgress one = SaveProgress.Done;
            Guard(entry, () => one = live.SaveLiveIterate(f, budget));
            WriteFooter(entry);
            // Strict priority, as in QEMU: while an iterable has more to send, later ones wait.
            if (one == SaveProgress.More) return SaveProgress.More;
        }
        return SaveProgress.Done;
    }

    /// <summary>Writes the END sections (QEMU: <c>qemu_savevm_state_complete_precopy_iterable</c>). BQL: held.</summary>
    /// <exception cref="VmmException">A section or the channel failed.</exception>
    public void SaveLiveCompletePrecopy()
    {
        Bql.AssertHeld();
        foreach ((SaveVmEntry entry, SaveRoles roles) in Iterables())
        {
            WriteShortHeader(entry, SectionType.End);
            Guard(entry, () => roles.Live?.SaveLiveCompletePrecopy(f));
            WriteFooter(entry);
        }
    }

    /// <summary>
    /// Writes the FULL sections (QEMU: <c>qemu_savevm_state_complete_precopy_non_iterable</c>). An iterable may have one too: VFIO's holds the config space.
    /// BQL: held.
    /// </summary>
    /// <exception cref="VmmException">A section or the channel failed.</exception>
    public void SaveState()
    {
        Bql.AssertHeld();
        foreach (SaveVmEntry entry in Entries)
        {
            if (entry.VmState is { IsEarlySetup: false } state) WriteFull(entry, state, null);
            else if (_attempts.Find(a => a.Entry == entry).Roles is { } roles) WriteFull(entry, roles.VmState, roles.State);
        }
    }

    /// <summary>Starts a thread for each device that sends its final state over data channels (QEMU: <c>save_complete_precopy_thread</c>).</summary>
    /// <param name="latch">Takes the exception of a thread that fails.</param>
    internal void StartThreads(FaultLatch latch)
    {
        ArgumentNullException.ThrowIfNull(latch);
        foreach ((SaveVmEntry entry, SaveRoles roles) in _attempts)
        {
            if (roles.CompleteThread is not { } thread || context.DataChannels is not { } channels) continue;
            _threads.Add(WorkerThread.Run($"mig/src/save_{entry.IdStr}", () =>
            {
                try
                {
                    thread.SaveLiveCompletePrecopyThread(new StateSink(channels, entry), context.Cancel);
                }
#pragma warning disable CA1031 // The latch keeps it; the thread that joins asks the latch.
                catch (Exception e)
#pragma warning restore CA1031
                {
                    latch.Set(e);
                }
            }));
        }
    }

    /// <summary>Waits for the devices' threads, which end early when the attempt is cancelled. Never throws.</summary>
    internal void JoinThreads()
    {
        Task.WaitAll([.. _threads]);
        _threads.Clear();
    }

    /// <summary>Writes the byte that ends the sections.</summary>
    public void WriteEof() => f.WriteByte((byte)SectionType.Eof);

    /// <summary>The number of acknowledgements that devices have begun to wait for since the last call. BQL: held or not.</summary>
    public int TakeSwitchoverAckRequests()
    {
        int n = 0;
        foreach ((_, SaveRoles roles) in _attempts) n += roles.SwitchoverAck?.TakeSwitchoverAckRequests() ?? 0;
        return n;
    }

    /// <summary>Ends the attempt of every section, successful or not (QEMU: <c>qemu_savevm_state_cleanup</c>). Takes the BQL.</summary>
    /// <exception cref="Exception">A section threw although it must not; the others were cleaned up all the same.</exception>
    public void SaveCleanup()
    {
        using (Bql.Acquire()) Each.Call(_attempts, static a => a.Roles.Cleanup?.SaveCleanup());
        _attempts.Clear();
    }

    private IEnumerable<(SaveVmEntry Entry, SaveRoles Roles)> Iterables() => _attempts.Where(static a => a.Roles.IsIterable);

    private PendingBytes Sum(Func<ISaveLive, PendingBytes> query)
    {
        PendingBytes sum = default;
        foreach ((_, SaveRoles roles) in _attempts)
            if (roles.Live is { } live) sum += query(live);
        return sum;
    }

    private void WriteFull(SaveVmEntry entry, IVmStateSection? state, ISaveState? code)
    {
        if ((state is null && code is null) || (state is not null && !state.IsNeeded())) return;
        WriteHeader(entry, SectionType.Full);
        FullSections.StartObject();
        FullSections.Member("name", entry.IdStr);
        FullSections.Member("instance_id", entry.InstanceId);
        Guard(entry, () =>
        {
            if (state is not null) state.Save(f, FullSections);
            else WriteCode(code!);
        });
        FullSections.EndObject();
        WriteFooter(entry);
    }

    private void WriteCode(ISaveState code)
    {
        long start = f.Position;
        code.SaveState(f);
        FullSections.Member("size", f.Position - start);
        FullSections.StartArray("fields");
        FullSections.StartObject();
        FullSections.Member("name", "data");
        FullSections.Member("size", f.Position - start);
        FullSections.Member("type", "buffer");
        FullSections.EndObject();
        FullSections.EndArray();
    }

    private void WriteHeader(SaveVmEntry entry, SectionType type)
    {
        WriteShortHeader(entry, type);
        f.WriteCountedString(entry.IdStr);
        f.WriteUInt32((uint)entry.InstanceId);
        f.WriteUInt32((uint)entry.VersionId);
    }

    private void WriteShortHeader(SaveVmEntry entry, SectionType type)
    {
        Section = entry.ToString();
        f.WriteByte((byte)type);
        f.WriteUInt32(entry.SectionId);
    }

    private void WriteFooter(SaveVmEntry entry)
    {
        if (context.Compat.SendSectionFooter)
        {
            f.WriteByte((byte)SectionType.Footer);
            f.WriteUInt32(entry.SectionId);
        }
        Section = null;
    }

    private void Guard(SaveVmEntry entry, Action body)
    {
        Section = entry.ToString();
        try
        {
            body();
        }
        catch (Exception e) when (e is not (VmmException or OperationCanceledException))
        {
            throw new DeviceStateException($"device '{entry.IdStr}' failed to save: {e.Message}", e);
        }
    }

    private sealed class StateSink(IDataChannels channels, SaveVmEntry entry) : IDeviceStateSink
    {
        public void Send(StateBuffer buffer) => channels.SendState(entry.IdStr, entry.InstanceId, buffer);
    }
}
