using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>
/// A hosted device: what <c>VfioUserServer</c> serves to one client at a time. The server keeps the protocol, the migration state
/// machine, the client's memory and the eventfds; a device has registers, a state, and perhaps a thread of its own that uses
/// <see cref="VfioUserHost.Dma"/> and <see cref="VfioUserHost.Irqs"/>.
/// <para>
/// Threads: every member is called on the session's thread, one call at a time; there is no BQL. A device with threads of its own must guard what it shares
/// with them. An errno returned here is the client's answer, unchanged (vfio-user S-54); so is that of a <see cref="VmmException"/>. Any other exception is a
/// bug of the device and ends at least the session.
/// </para>
/// </summary>
public interface IVfioUserBackend : IDisposable
{
    /// <summary>Device type, up to 64 ASCII characters; a stream of another type is refused when it is loaded (vfio-user S-41).</summary>
    string TypeName { get; }

    /// <summary>The regions it has, 0 to 8 (<see cref="VfioPciRegion"/>), config space included. Constant.</summary>
    IReadOnlyList<VfioUserRegion> Regions { get; }

    /// <summary>Vectors of one interrupt index (<see cref="VfioPciIrq"/>), up to 2048; 0 when it has none. Constant.</summary>
    /// <param name="index">Interrupt index, 0 to 4.</param>
    /// <returns>Number of vectors.</returns>
    uint GetIrqCount(uint index);

    /// <summary>What its migration can do; <see cref="VfioMigrationFlags.None"/> when it cannot migrate. Constant.</summary>
    VfioMigrationFlags MigrationFlags { get; }

    /// <summary>Called once, before anything else.</summary>
    /// <param name="host">The server's side; lives as long as the device.</param>
    /// <exception cref="VmmException">The device cannot start; the server's constructor passes it on.</exception>
    void Realize(VfioUserHost host);

    /// <summary>
    /// Reads registers. The range is inside the region; undefined registers read as 0. It never fails (vfio-user S-15), and never waits for DMA
    /// (vfio-user S-30).
    /// </summary>
    /// <param name="index">One of <see cref="Regions"/>.</param>
    /// <param name="offset">First byte of the access, from the region's start.</param>
    /// <param name="destination">1, 2, 4 or 8 bytes for a guest's access, or any length for a bulk read. Zeroed before the call; fill all of it.</param>
    void RegionRead(uint index, ulong offset, Span<byte> destination);

    /// <summary>Writes registers; as <see cref="RegionRead"/>, writes to undefined or read-only registers are ignored.</summary>
    /// <param name="index">One of <see cref="Regions"/>.</param>
    /// <param name="offset">First byte of the access, from the region's start.</param>
    /// <param name="source">Bytes to write, as wide as the guest's access.</param>
    void RegionWrite(uint index, ulong offset, ReadOnlySpan<byte> source);

    /// <summary>
    /// Stops DMA and waits until transfers under way have ended; called before maps, unmaps, resets and state changes
    /// (vfio-user 7). It may complete later, within 3 s; the server delivers the client's replies to DMA meanwhile.
    /// </summary>
    /// <returns>None, or any errno to refuse; the request that needed the quiesce is then answered with EIO.</returns>
    ValueTask<Errno> Quiesce();

    /// <summary>Ends a quiesce that succeeded; DMA may go on if the migration state allows it.</summary>
    void Unquiesce();

    /// <summary>Resets the device to its power-on state and to RUNNING. The server has disposed its sessions before.</summary>
    /// <param name="reason">What caused the reset.</param>
    /// <returns>None, or an errno when the device is broken; its migration state then becomes ERROR.</returns>
    ValueTask<Errno> Reset(VfioUserResetReason reason);

    /// <summary>Called when the client is gone, with its memory and its eventfds. The device keeps its state (vfio-user S-33).</summary>
    void ClientLost();

    /// <summary>
    /// Walks one arc of the migration state machine (vfio-user 8, direct arcs). A device that shares something with another end, such as a file lock,
    /// acquires it in STOP to RUNNING and releases it in STOP_COPY to STOP (vfio-user S-52). Called while quiesced.
    /// </summary>
    /// <param name="from">Present state.</param>
    /// <param name="to">State to enter, one arc away.</param>
    /// <returns>None, or an errno to refuse; the device then is still in <paramref name="from"/>.</returns>
    ValueTask<Errno> Transition(VfioDeviceState from, VfioDeviceState to);

    /// <summary>
    /// About how many bytes of state the device gives after it has stopped, in any migration state; a client plans its downtime by it (MIG_DATA_SIZE).
    /// It binds nobody: a save is a stream of any length (vfio-user S-44).
    /// </summary>
    /// <returns>Bytes; null when the device does not know, which a client takes for a very large state.</returns>
    ulong? EstimateStateBytes() => null;

    /// <summary>Opens a saving session: after the arc into PRE_COPY, or into STOP_COPY when there was no PRE_COPY before.</summary>
    /// <returns>The session; the server disposes it when the saving states are left.</returns>
    IVfioUserSave OpenSave();

    /// <summary>Opens a resuming session, after the arc into RESUMING.</summary>
    /// <returns>The session; the server disposes it when RESUMING is left, and resets the device if the session was not committed.</returns>
    IVfioUserLoad OpenLoad();
}
