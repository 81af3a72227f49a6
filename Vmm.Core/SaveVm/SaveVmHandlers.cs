using Vmm.Core.Wire;

namespace Vmm.Core.SaveVm;

/// <summary>
/// The roles a migratable object plays. A missing role means something, as a NULL callback does in QEMU: no <see cref="Live"/> and no
/// <see cref="Setup"/> makes an ordinary device, their presence makes an iterable one. Settled at registration (QEMU: <c>SaveVMHandlers</c>).
/// </summary>
public sealed record SaveVmHandlers
{
    /// <summary>One-shot state in a FULL section.</summary>
    public ISaveState? State { get; init; }

    /// <summary>Setup and cleanup on the source.</summary>
    public ISaveSetup? Setup { get; init; }

    /// <summary>Iterations while the VM runs and the final part after it stopped.</summary>
    public ISaveLive? Live { get; init; }

    /// <summary>The final part on a thread of its own, where the channel offers one.</summary>
    public ISaveCompleteThread? CompleteThread { get; init; }

    /// <summary>Loading.</summary>
    public ILoadState? Load { get; init; }

    /// <summary>Loading from buffers that arrive out of order.</summary>
    public ILoadStateBuffer? LoadBuffer { get; init; }

    /// <summary>The destination's wish to acknowledge the switchover.</summary>
    public ISwitchoverAck? SwitchoverAck { get; init; }

    /// <summary>Whether the handler takes part at all right now; null means always (QEMU: <c>is_active</c>).</summary>
    public Func<bool>? IsActive { get; init; }

    /// <summary>True when the handler has START, PART and END sections.</summary>
    public bool IsIterable => Setup is not null || Live is not null;

    /// <summary>Collects every role that an object implements.</summary>
    /// <param name="roles">The object.</param>
    /// <returns>The record; narrow it with <c>with</c>.</returns>
    public static SaveVmHandlers Of(object roles) => new()
    {
        State = roles as ISaveState,
        Setup = roles as ISaveSetup,
        Live = roles as ISaveLive,
        CompleteThread = roles as ISaveCompleteThread,
        Load = roles as ILoadState,
        LoadBuffer = roles as ILoadStateBuffer,
        SwitchoverAck = roles as ISwitchoverAck,
    };
}

/// <summary>What is still to be sent (QEMU: <c>state_pending_estimate</c>, <c>state_pending_exact</c>).</summary>
/// <param name="PrecopyBytes">Can be sent while the VM runs.</param>
/// <param name="StopCopyBytes">Can only be sent after the VM has stopped.</param>
/// <param name="PostcopyBytes">Could also be sent after the destination runs.</param>
public readonly record struct PendingBytes(long PrecopyBytes, long StopCopyBytes = 0, long PostcopyBytes = 0)
{
    /// <summary>Everything that must move before the destination can run, postcopy aside.</summary>
    public long TotalBytes => PrecopyBytes + StopCopyBytes + PostcopyBytes;

    /// <summary>Adds two.</summary>
    /// <param name="a">One.</param>
    /// <param name="b">Other.</param>
    /// <returns>The sum by member.</returns>
    public static PendingBytes operator +(PendingBytes a, PendingBytes b) =>
        new(a.PrecopyBytes + b.PrecopyBytes, a.StopCopyBytes + b.StopCopyBytes, a.PostcopyBytes + b.PostcopyBytes);

    /// <summary>Adds two.</summary>
    /// <param name="other">Other.</param>
    /// <returns>The sum by member.</returns>
    public PendingBytes Add(PendingBytes other) => this + other;
}

/// <summary>How an iteration ended.</summary>
public enum SaveProgress
{
    /// <summary>The budget ran out; there is more to send.</summary>
    More,
    /// <summary>Nothing is left to send until something becomes dirty.</summary>
    Done,
}

/// <summary>How much one iteration may send (QEMU: <c>migration_rate_exceeded</c> and the 50 ms slice of <c>ram_save_iterate</c>).</summary>
public sealed class IterateBudget
{
    private readonly long _limitPosition;
    private readonly long _deadline;
    private readonly CancellationToken _cancel;

    /// <summary>Makes a budget.</summary>
    /// <param name="limitPosition">Stream offset at which to stop; <see cref="long.MaxValue"/> for none.</param>
    /// <param name="duration">Longest time.</param>
    /// <param name="cancel">Ends the iteration early.</param>
    public IterateBudget(long limitPosition, TimeSpan duration, CancellationToken cancel)
    {
        _limitPosition = limitPosition;
        _deadline = Environment.TickCount64 + (long)duration.TotalMilliseconds;
        _cancel = cancel;
    }

    /// <summary>An unlimited budget.</summary>
    public static IterateBudget Unlimited { get; } = new(long.MaxValue, TimeSpan.FromDays(1000), CancellationToken.None);

    /// <summary>True when the iteration should end after the present record.</summary>
    /// <param name="position">Stream offset now.</param>
    /// <returns>Whether to stop; checks the clock, so ask once in some dozens of pages.</returns>
    public bool IsExhausted(long position) => position >= _limitPosition || _cancel.IsCancellationRequested || Environment.TickCount64 >= _deadline;

    /// <summary>True when the byte limit is reached; cheap.</summary>
    /// <param name="position">Stream offset now.</param>
    /// <returns>Whether to stop.</returns>
    public bool IsOverBytes(long position) => position >= _limitPosition;
}

/// <summary>BQL: held. One-shot device state (QEMU: <c>save_state</c>).</summary>
public interface ISaveState
{
    /// <summary>Writes the body of the FULL section. The VM is stopped.</summary>
    /// <param name="f">The stream.</param>
    void SaveState(QemuFileWriter f);
}

/// <summary>BQL: held. Start and end of a migration on the source (QEMU: <c>save_prepare</c>, <c>save_setup</c>, <c>save_cleanup</c>).</summary>
public interface ISaveSetup
{
    /// <summary>Before anything is written; throws to veto.</summary>
    void SavePrepare();

    /// <summary>Writes the body of the START section.</summary>
    /// <param name="f">The stream.</param>
    /// <param name="cancel">The migration is being cancelled.</param>
    void SaveSetup(QemuFileWriter f, CancellationToken cancel);

    /// <summary>Always last, also when setup never ran; must not throw.</summary>
    void SaveCleanup();
}

/// <summary>BQL: not held for estimate and iterate; held for exact and complete. The VM runs until complete.</summary>
public interface ISaveLive
{
    /// <summary>Whether to iterate now (QEMU: <c>is_active_iterate</c>).</summary>
    bool IsActiveIterate { get; }

    /// <summary>Cheap figure from what is known (QEMU: <c>state_pending_estimate</c>). BQL: not held.</summary>
    /// <returns>Bytes.</returns>
    PendingBytes EstimatePending();

    /// <summary>Figure after a synchronisation with all sources (QEMU: <c>state_pending_exact</c>). BQL: held.</summary>
    /// <returns>Bytes.</returns>
    PendingBytes ExactPending();

    /// <summary>Writes the body of one PART section (QEMU: <c>save_live_iterate</c>). BQL: not held.</summary>
    /// <param name="f">The stream.</param>
    /// <param name="budget">When to stop.</param>
    /// <returns>Whether something is left.</returns>
    SaveProgress SaveLiveIterate(QemuFileWriter f, IterateBudget budget);

    /// <summary>Writes the body of the END section; the VM is stopped (QEMU: <c>save_live_complete_precopy</c>, <c>save_complete</c>). BQL: held.</summary>
    /// <param name="f">The stream.</param>
    void SaveLiveCompletePrecopy(QemuFileWriter f);
}

/// <summary>Receives device state buffers that leave on data channels, in any order.</summary>
public interface IDeviceStateSink
{
    /// <summary>Sends one buffer; blocks while the channels are full.</summary>
    /// <param name="buffer">Opaque device data; may be reused after the call.</param>
    void Send(ReadOnlySpan<byte> buffer);
}

/// <summary>BQL: not held. Runs on a worker of its own beside the END sections (QEMU: <c>save_live_complete_precopy_thread</c>).</summary>
public interface ISaveCompleteThread
{
    /// <summary>
    /// Whether this migration takes the device's final state over data channels; set before <see cref="ISaveSetup.SaveSetup"/> by an engine whose
    /// channel offers them. The END and FULL sections are then empty. BQL: held.
    /// </summary>
    bool UsesCompleteThread { get; set; }

    /// <summary>Sends the rest of the device's state.</summary>
    /// <param name="sink">Where buffers go.</param>
    /// <param name="cancel">The migration is being cancelled.</param>
    void SaveLiveCompletePrecopyThread(IDeviceStateSink sink, CancellationToken cancel);
}

/// <summary>BQL: held, but not for START, PART and END sections of iterables. Loading on the destination (QEMU: <c>load_setup</c>, <c>load_state</c>, <c>load_cleanup</c>).</summary>
public interface ILoadState
{
    /// <summary>Before the first section.</summary>
    /// <param name="f">The stream; nothing may be read from it here.</param>
    void LoadSetup(QemuFileReader f);

    /// <summary>Reads the body of a START, PART, END or FULL section.</summary>
    /// <param name="f">The stream.</param>
    /// <param name="versionId">Version from the section's header.</param>
    void LoadState(QemuFileReader f, int versionId);

    /// <summary>At the end, well or not, also when setup never ran; must not throw.</summary>
    void LoadCleanup();
}

/// <summary>BQL: not held. Loading from data channels (QEMU: <c>load_state_buffer</c>, <c>switchover_start</c>).</summary>
public interface ILoadStateBuffer
{
    /// <summary>Whether this load takes buffers; set before <see cref="ILoadState.LoadSetup"/> by an engine whose channel offers them. BQL: held.</summary>
    bool UsesLoadBuffers { get; set; }

    /// <summary>Takes one buffer, in any order, possibly on several threads, perhaps before <see cref="SwitchoverStart"/>.</summary>
    /// <param name="buffer">Opaque device data.</param>
    void LoadStateBuffer(ReadOnlySpan<byte> buffer);

    /// <summary>The source has stopped its VM. BQL: held.</summary>
    void SwitchoverStart();

    /// <summary>The channels have ended: what is missing now will never come. Any thread.</summary>
    void NoMoreBuffers();

    /// <summary>Waits until all buffers are loaded, and takes the BQL for what needs it at the end. BQL: not held. Throws what went wrong.</summary>
    /// <param name="cancel">The load is being given up.</param>
    void WaitLoaded(CancellationToken cancel);
}

/// <summary>
/// A device whose first precopy data the destination should have loaded before the source switches over (QEMU: <c>switchover_ack_needed</c>,
/// capability switchover-ack; spec vfio-migration 3.6). BQL: held unless said otherwise.
/// </summary>
public interface ISwitchoverAck
{
    /// <summary>Destination: true if this device will acknowledge; asked after <see cref="ILoadState.LoadSetup"/>.</summary>
    bool SwitchoverAckNeeded { get; }

    /// <summary>Destination: called by the device, without the BQL, for each first part it has loaded; null while the capability is off.</summary>
    Action? SwitchoverApproved { get; set; }

    /// <summary>Source: whether the capability is on for the migration that begins.</summary>
    bool SwitchoverAckEnabled { get; set; }

    /// <summary>Source: how many acknowledgements the device wants beyond those it has asked for before. BQL: not held.</summary>
    /// <returns>New requests since the last call.</returns>
    int TakeSwitchoverAckRequests();
}
