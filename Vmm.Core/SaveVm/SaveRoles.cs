using Vmm.Core.Memory;
using Vmm.Core.Wire;

namespace Vmm.Core.SaveVm;

/// <summary>
/// The roles that an object plays in one attempt to save; null means that it does not play the role. An object with <see cref="Setup"/> or
/// <see cref="Live"/> is an iterable and has START, PART and END sections; any other has one FULL section. One thread makes all calls of an attempt, except
/// that of <see cref="CompleteThread"/>. A role that throws fails the attempt: a <see cref="Errors.VmmException"/> is its reason as it is, any other exception
/// is wrapped in a <see cref="Errors.DeviceStateException"/> that names the section.
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

    /// <summary>Sends the final part on a thread of its own; null unless <see cref="SaveContext.HasDataChannels"/> is true.</summary>
    public ISaveCompleteThread? CompleteThread { get; init; }

    /// <summary>Asks for acknowledgements of first data; null unless capability switchover-ack is on.</summary>
    public ISwitchoverAck? SwitchoverAck { get; init; }

    /// <summary>The end of the attempt.</summary>
    public ISaveCleanup? Cleanup { get; init; }

    /// <summary>True when the attempt has START, PART and END sections.</summary>
    public bool IsIterable => Setup is not null || Live is not null;

    internal bool IsEmpty => State is null && VmState is null && !IsIterable;

    /// <summary>Collects every role that an object implements; <c>with</c> removes those that do not apply in this attempt.</summary>
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
    /// <exception cref="Errors.VmmException">The state cannot be read; the attempt fails.</exception>
    void SaveState(QemuFileWriter f);
}

/// <summary>The beginning of the stream (QEMU: <c>save_setup</c>).</summary>
public interface ISaveSetup
{
    /// <summary>Writes the body of the START section. BQL: held.</summary>
    /// <exception cref="Errors.VmmException">The device cannot begin; the attempt fails.</exception>
    void SaveSetup(QemuFileWriter f);
}

/// <summary>The end of an attempt, successful or not (QEMU: <c>save_cleanup</c>).</summary>
public interface ISaveCleanup
{
    /// <summary>Releases what the attempt took, even when no section was ever written; must not throw. BQL: held.</summary>
    void SaveCleanup();
}

/// <summary>State that is sent while the VM runs. BQL: not held for estimate and iterate; held for exact and complete.</summary>
public interface ISaveLive
{
    /// <summary>True when there is a PART section to write now (QEMU: <c>is_active_iterate</c>).</summary>
    bool IsActiveIterate { get; }

    /// <summary>What is left, from figures at hand (QEMU: <c>state_pending_estimate</c>). BQL: not held.</summary>
    PendingBytes EstimatePending();

    /// <summary>What is left, after a synchronisation with all sources (QEMU: <c>state_pending_exact</c>). BQL: held.</summary>
    /// <exception cref="Errors.VmmException">A source failed; the attempt fails.</exception>
    PendingBytes ExactPending();

    /// <summary>Writes the body of one PART section until the budget is used up (QEMU: <c>save_live_iterate</c>). BQL: not held.</summary>
    /// <exception cref="Errors.VmmException">The device or the channel failed; the attempt fails.</exception>
    SaveProgress SaveLiveIterate(QemuFileWriter f, IterateBudget budget);

    /// <summary>Writes the body of the END section; the VM is stopped (QEMU: <c>save_live_complete_precopy</c>, <c>save_complete</c>). BQL: held.</summary>
    /// <exception cref="Errors.VmmException">The device or the channel failed; the attempt fails.</exception>
    void SaveLiveCompletePrecopy(QemuFileWriter f);
}

/// <summary>A device's final state over data channels, beside the END sections (QEMU: <c>save_live_complete_precopy_thread</c>).</summary>
public interface ISaveCompleteThread
{
    /// <summary>
    /// Sends the rest of the device's state to the sink; its END and FULL sections then carry none. Runs on a thread of its own and ends early when
    /// <paramref name="cancel"/> fires. BQL: not held.
    /// </summary>
    /// <exception cref="Errors.VmmException">The device failed; the attempt fails.</exception>
    /// <exception cref="OperationCanceledException">The attempt has ended otherwise.</exception>
    void SaveLiveCompletePrecopyThread(IDeviceStateSink sink, CancellationToken cancel);
}

/// <summary>
/// A device whose first precopy data the destination must have loaded before the source switches over (QEMU: <c>switchover_ack_needed</c>, capability
/// switchover-ack; vfio-migration 3.6).
/// </summary>
public interface ISwitchoverAck
{
    /// <summary>The number of acknowledgements that the device has begun to wait for since the last call. BQL: held or not.</summary>
    int TakeSwitchoverAckRequests();
}

/// <summary>Takes buffers of device state that leave on data channels, in any order.</summary>
public interface IDeviceStateSink
{
    /// <summary>Sends one buffer and owns it from then on, even when it throws; blocks while the channels are full. Any thread. BQL: not held.</summary>
    /// <exception cref="Errors.VmmException">The attempt has failed; this is its reason.</exception>
    /// <exception cref="OperationCanceledException">The attempt was cancelled.</exception>
    void Send(StateBuffer buffer);
}

/// <summary>Channels beside the stream (QEMU: multifd).</summary>
internal interface IDataChannels
{
    /// <summary>True when the channels carry device state, too; they do not while they compress.</summary>
    bool CarriesState { get; }

    /// <summary>True when the channels look for zero pages themselves.</summary>
    bool DetectsZeroPages { get; }

    /// <summary>Adds the page with that index in the block. Its content is read later, so its dirty mark must be clear already. One thread.</summary>
    /// <param name="block">The block.</param>
    /// <param name="page">Index of the page.</param>
    /// <param name="isZero">True for a page that is known to be zero; only if <see cref="DetectsZeroPages"/>.</param>
    void AddPage(RamBlock block, long page, bool isZero);

    /// <summary>What the channels have sent so far. Any thread.</summary>
    SentPages Sent { get; }

    /// <summary>
    /// Makes the receiver of every channel wait, behind the pages added so far, until it has read the mark that the caller then writes to the stream.
    /// </summary>
    /// <param name="always">False to do so only if pages were added since the last time.</param>
    /// <returns>True when the caller must write the mark.</returns>
    bool Sync(bool always);

    /// <summary>
    /// Sends one buffer of the state of the device with that section name and instance id, and owns it from then on, even when it throws; blocks while the
    /// channels are full. Any thread.
    /// </summary>
    void SendState(string idStr, int instanceId, StateBuffer buffer);
}

/// <summary>What data channels have sent.</summary>
/// <param name="NormalPages">Pages with their content.</param>
/// <param name="ZeroPages">Pages of which only the place was sent.</param>
/// <param name="Bytes">Bytes of both and of their headers.</param>
internal readonly record struct SentPages(long NormalPages, long ZeroPages, long Bytes);
