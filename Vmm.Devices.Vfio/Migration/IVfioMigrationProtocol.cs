using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// One generation of the migration protocol, below the handlers that write the tags. It is probed once when the device is realized. State
/// changes come with the BQL held; reading and writing data may run without it, on the migration thread. Failures are
/// <see cref="VfioException"/>s that say where the device was left.
/// </summary>
internal interface IVfioMigrationProtocol : IDisposable
{
    /// <summary>1 or 2.</summary>
    int Version { get; }

    /// <summary>What the device can do; a v1 device can do STOP_COPY and PRE_COPY.</summary>
    VfioMigrationFlags Flags { get; }

    /// <summary>The state the device was last seen in; ERROR once it could not even be reset.</summary>
    VfioDeviceState State { get; }

    /// <summary>Raised after each change of <see cref="State"/>, on the changing thread.</summary>
    event Action<VfioDeviceState>? StateChanged;

    /// <summary>Moves the device.</summary>
    /// <param name="target">Where to.</param>
    /// <param name="recoverTo">Where to go when that fails; ERROR to reset at once. A failed recovery resets too.</param>
    /// <exception cref="VfioException">The target was not reached; carries the first refusal and what became of the device.</exception>
    void SetState(VfioDeviceState target, VfioDeviceState recoverTo);

    /// <summary>The device was reset by its owner: it runs, sessions are over.</summary>
    void OnReset();

    /// <summary>Where a stop of the VM takes the device.</summary>
    /// <param name="state">The run state being entered.</param>
    /// <returns>STOP or STOP_COPY.</returns>
    VfioDeviceState StopTarget(RunState state);

    /// <summary>The VM is about to stop while first data may still appear (vfio-migration 3.3).</summary>
    void BeforePrecopyStops();

    /// <summary>Begins a saving session as far as the device's state allows.</summary>
    /// <param name="switchoverAck">The destination acknowledges first data.</param>
    void SaveSetup(bool switchoverAck);

    /// <summary>Whether PART sections have something to say now.</summary>
    bool IsActiveIterate { get; }

    /// <summary>From what is known.</summary>
    /// <returns>Bytes.</returns>
    PendingBytes EstimatePending();

    /// <summary>After asking the device.</summary>
    /// <returns>Bytes.</returns>
    PendingBytes ExactPending();

    /// <summary>Writes the data record of one PART section, if any.</summary>
    /// <param name="f">The stream.</param>
    /// <returns>Whether anything is left, and the tag that ends the section.</returns>
    (SaveProgress Progress, ulong EndTag) SaveIterate(QemuFileWriter f);

    /// <summary>Moves the device to STOP_COPY and writes all that is left as data records.</summary>
    /// <param name="f">The stream.</param>
    void SaveComplete(QemuFileWriter f);

    /// <summary>Whether <see cref="ReadStopCopy"/> and <see cref="LoadBytes"/> may run on a thread of their own; v2 only.</summary>
    bool CanUseThreads { get; }

    /// <summary>Moves the device to STOP_COPY, for <see cref="ReadStopCopy"/>.</summary>
    void EnterStopCopy();

    /// <summary>Reads a piece of what is left.</summary>
    /// <param name="into">Takes it.</param>
    /// <returns>Bytes; 0 at the end.</returns>
    int ReadStopCopy(Span<byte> into);

    /// <summary>Ends the session, well or not; never throws, a refusal is reported through the return value.</summary>
    /// <returns>Why the device could not be left in good order, or null.</returns>
    Exception? SaveCleanup();

    /// <summary>Acknowledgements the device has begun to want since the last call.</summary>
    /// <returns>Number.</returns>
    int TakeSwitchoverAckRequests();

    /// <summary>Makes the device ready to take state.</summary>
    void LoadSetup();

    /// <summary>Passes data to the device in bounded pieces.</summary>
    /// <param name="f">The stream, at the first byte.</param>
    /// <param name="lengthBytes">Bytes that follow.</param>
    void LoadData(QemuFileReader f, ulong lengthBytes);

    /// <summary>Passes bytes to the device.</summary>
    /// <param name="bytes">In order.</param>
    void LoadBytes(ReadOnlySpan<byte> bytes);

    /// <summary>All data have come: the device checks them where the protocol lets it.</summary>
    void LoadDone();

    /// <summary>Ends the session, well or not; must not throw.</summary>
    void LoadCleanup();
}
