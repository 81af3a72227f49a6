using Vmm.Core.Memory;
using Vmm.Core.Wire;

namespace Vmm.Core.SaveVm;

/// <summary>
/// The roles that an object plays in one attempt to save. A missing role means something, as a NULL callback does in QEMU: without
/// <see cref="Setup"/> and <see cref="Live"/> the section is an ordinary device's, with one of them it is an iterable's.
/// </summary>
public sealed record SaveRoles
{
    /// <summary>One-shot state in a FULL section, written by code.</summary>
    public ISaveState? State { get; init; }

    /// <summary>One-shot state in a FULL section, declared and bound to the attempt's object.</summary>
    public IVmStateSection? VmState { get; init; }

    /// <summary>The START section.</summary>
    public ISaveSetup? Setup { get; init; }

    /// <summary>PART sections while the VM runs and the END section after it has stopped.</summary>
    public ISaveLive? Live { get; init; }

    /// <summary>The final part on a thread of its own; only where <see cref="SaveContext.HasDataChannels"/> says that there are some.</summary>
    public ISaveCompleteThread? CompleteThread { get; init; }

    /// <summary>Asks for acknowledgements of first data; only while capability switchover-ack is on.</summary>
    public ISwitchoverAck? SwitchoverAck { get; init; }

    /// <summary>The end of the attempt.</summary>
    public ISaveCleanup? Cleanup { get; init; }

    /// <summary>True when the attempt has START, PART and END sections.</summary>
    public bool IsIterable => Setup is not null || Live is not null;

    internal bool IsEmpty => State is null && VmState is null && !IsIterable;

    /// <summary>Collects every role that an object implements.</summary>
    /// <param name="attempt">The object.</param>
    /// <returns>The record; narrow it with <c>with</c>.</returns>
    public static SaveRoles Of(object attempt) => new()
    {
        State = attempt as ISaveState,
        VmState = attempt as IVmStateSection,
        Setup = attempt as ISaveSetup,
        Live = attempt as ISaveLive,
        CompleteThread = attempt as ISaveCompleteThread,
        SwitchoverAck = attempt as ISwitchoverAck,
        Cleanup = attempt as ISaveCleanup,
    };
}

/// <summary>One-shot device state (QEMU: <c>save_state</c>).</summary>
public interface ISaveState
{
    /// <summary>Writes the body of the FULL section. The VM is stopped. BQL: held.</summary>
    /// <param name="f">The stream.</param>
    void SaveState(QemuFileWriter f);
}

/// <summary>The beginning of the stream (QEMU: <c>save_setup</c>).</summary>
public interface ISaveSetup
{
    /// <summary>Writes the body of the START section. BQL: held.</summary>
    /// <param name="f">The stream.</param>
    void SaveSetup(QemuFileWriter f);
}

/// <summary>The end of an attempt, well or not (QEMU: <c>save_cleanup</c>).</summary>
public interface ISaveCleanup
{
    /// <summary>Gives back what the attempt took, also when no section was ever written; must not throw. BQL: held.</summary>
    void SaveCleanup();
}

/// <summary>State that is sent while the VM runs. BQL: not held for estimate and iterate; held for exact and complete.</summary>
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

/// <summary>A device's final state over data channels, beside the END sections (QEMU: <c>save_live_complete_precopy_thread</c>).</summary>
public interface ISaveCompleteThread
{
    /// <summary>Sends the rest of the device's state; its END and FULL sections then carry none. Runs on a thread of its own. BQL: not held.</summary>
    /// <param name="sink">Where buffers go.</param>
    /// <param name="cancel">The attempt is being cancelled.</param>
    void SaveLiveCompletePrecopyThread(IDeviceStateSink sink, CancellationToken cancel);
}

/// <summary>
/// A device whose first precopy data the destination loads before the source switches over (QEMU: <c>switchover_ack_needed</c>, capability
/// switchover-ack; vfio-migration 3.6).
/// </summary>
public interface ISwitchoverAck
{
    /// <summary>How many acknowledgements the device wants beyond those that it has asked for before. BQL: not held.</summary>
    /// <returns>New requests since the last call.</returns>
    int TakeSwitchoverAckRequests();
}

/// <summary>Receives device state buffers that leave on data channels, in any order.</summary>
public interface IDeviceStateSink
{
    /// <summary>Sends one buffer; blocks while the channels are full. Any thread.</summary>
    /// <param name="buffer">Opaque device data; the callee's from here on, also when it throws.</param>
    void Send(StateBuffer buffer);
}

/// <summary>Channels beside the stream (QEMU: multifd).</summary>
internal interface IDataChannels
{
    /// <summary>Adds a page. Its content is read later, so its dirty mark must be clear already. One thread.</summary>
    /// <param name="block">Its block.</param>
    /// <param name="page">Page index in the block.</param>
    void AddPage(RamBlock block, long page);

    /// <summary>Makes all channels wait, behind what was added so far, until the stream has come to the mark that the caller then writes.</summary>
    /// <param name="always">False: only if pages were added since the last time.</param>
    /// <returns>Whether there is a mark to write.</returns>
    bool Sync(bool always);

    /// <summary>Sends one buffer of a device's state; blocks while the channels are full. Any thread.</summary>
    /// <param name="idStr">Section name.</param>
    /// <param name="instanceId">Instance id.</param>
    /// <param name="buffer">Opaque device data; the callee's from here on, also when it throws.</param>
    void SendState(string idStr, int instanceId, StateBuffer buffer);
}
