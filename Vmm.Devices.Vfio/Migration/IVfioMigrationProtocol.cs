using Vmm.Core.RunStates;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// One generation of the migration protocol: what belongs to the device for as long as it is realized. What belongs to one attempt lives in the
/// session that <see cref="OpenSave"/> or <see cref="OpenLoad"/> makes. Failures are <see cref="VfioException"/>s that name the state in which
/// the device was left. BQL: held.
/// </summary>
internal interface IVfioMigrationProtocol : IDisposable
{
    /// <summary>1 or 2.</summary>
    int Version { get; }

    /// <summary>What the device can do; a v1 device can do STOP_COPY and PRE_COPY.</summary>
    VfioMigrationFlags Flags { get; }

    /// <summary>The state the device was last seen in; ERROR once it could not even be reset. Any thread.</summary>
    VfioDeviceState State { get; }

    /// <summary>Raised after each change of <see cref="State"/>, on the changing thread.</summary>
    event Action<VfioDeviceState>? StateChanged;

    /// <summary>Moves the device. A session may call it without the BQL, on the thread that sends the final state.</summary>
    /// <param name="target">State to enter.</param>
    /// <param name="recoverTo">State to try when that fails; ERROR to reset the device at once. A failed recovery resets it too.</param>
    /// <exception cref="VfioException">The target was not reached; carries the first refusal and what became of the device.</exception>
    void SetState(VfioDeviceState target, VfioDeviceState recoverTo);

    /// <summary>Asks the device for its state, because another process may have changed it; an answer that makes no sense changes nothing.</summary>
    void ReadState();

    /// <summary>The device was reset by its owner: it is in RUNNING and has closed its data descriptor.</summary>
    void OnReset();

    /// <summary>
    /// The device's owner could not reset it. A device that says that it runs or is stopped is there, one that is being saved is stopped; in any other
    /// state, or without an answer, it is in ERROR, because nobody knows what it holds.
    /// </summary>
    void OnResetFailed();

    /// <summary>Where a stop of the VM takes the device.</summary>
    /// <param name="state">The run state being entered.</param>
    /// <returns>STOP or STOP_COPY.</returns>
    VfioDeviceState StopTarget(RunState state);

    /// <summary>Tells an open saving session that the VM is about to stop, while first data may still appear (vfio-migration 3.3).</summary>
    void BeforePrecopyStops();

    /// <summary>Whether the sessions are <see cref="IVfioThreadedSave"/> and <see cref="IVfioThreadedLoad"/>; v2 only.</summary>
    bool CanUseThreads { get; }

    /// <summary>Opens the saving session of an attempt; the device stays as it is.</summary>
    /// <param name="switchoverAck">The destination acknowledges first data.</param>
    /// <returns>The session; open until its <see cref="IVfioSaveSession.SaveCleanup"/>.</returns>
    /// <exception cref="VfioException">A session is open (EBUSY).</exception>
    IVfioSaveSession OpenSave(bool switchoverAck);

    /// <summary>Opens the loading session of an attempt and makes the device ready to take state.</summary>
    /// <returns>The session; open until its <see cref="IVfioLoadSession.LoadCleanup"/>.</returns>
    /// <exception cref="VfioException">A session is open (EBUSY), or the device refused.</exception>
    IVfioLoadSession OpenLoad();
}
