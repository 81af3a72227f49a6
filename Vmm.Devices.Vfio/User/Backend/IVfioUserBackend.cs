using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>
/// A hosted device: what <c>VfioUserServer</c> serves to one client at a time. The server keeps the protocol, the migration state
/// machine, the client's memory and the eventfds; a device has registers, a state, and perhaps a thread of its own that uses
/// <see cref="VfioUserHost.Dma"/> and <see cref="VfioUserHost.Irqs"/>.
/// <para>
/// Threads: every member is called on the session's thread, one call at a time. A device with a thread of its own guards what both touch.
/// An errno returned here is the client's answer, unchanged (vfio-user S-54).
/// </para>
/// </summary>
public interface IVfioUserBackend : IDisposable
{
    /// <summary>Device type, up to 64 ASCII characters; a stream of another type is refused when it is loaded (vfio-user S-41).</summary>
    string TypeName { get; }

    /// <summary>The regions it has, 0 to 8 (<see cref="VfioPciRegion"/>), config space included. Constant.</summary>
    IReadOnlyList<VfioUserRegion> Regions { get; }

    /// <summary>Vectors of one interrupt index (<see cref="VfioPciIrq"/>), up to 2048; 0 when it has none. Constant.</summary>
    /// <param name="index">0 to 4.</param>
    /// <returns>Vectors.</returns>
    uint GetIrqCount(uint index);

    /// <summary>What its migration can do; <see cref="VfioMigrationFlags.None"/> when it cannot migrate. Constant.</summary>
    VfioMigrationFlags MigrationFlags { get; }

    /// <summary>Called once, before anything else.</summary>
    /// <param name="host">The server's side; lives as long as the device.</param>
    void Realize(VfioUserHost host);

    /// <summary>Reads registers. The range is inside the region; undefined registers read as 0. It never fails (vfio-user S-15), and never waits for DMA (vfio-user S-30).</summary>
    /// <param name="index">One of <see cref="Regions"/>.</param>
    /// <param name="offset">From its start.</param>
    /// <param name="destination">1, 2, 4 or 8 bytes of a guest's access, or any bulk; filled completely, starts as zeros.</param>
    void RegionRead(uint index, ulong offset, Span<byte> destination);

    /// <summary>Writes registers; as <see cref="RegionRead"/>, writes to undefined or read-only registers are ignored.</summary>
    /// <param name="index">One of <see cref="Regions"/>.</param>
    /// <param name="offset">From its start.</param>
    /// <param name="source">The bytes.</param>
    void RegionWrite(uint index, ulong offset, ReadOnlySpan<byte> source);

    /// <summary>
    /// Stops touching guest memory and waits until what was begun has ended; called before maps, unmaps, resets and state changes
    /// (vfio-user 7). It may complete later, within 3 s; the client's replies to DMA are delivered meanwhile.
    /// </summary>
    /// <returns>Not None: the request that needed it is refused with EIO.</returns>
    ValueTask<Errno> Quiesce();

    /// <summary>Ends a quiesce that succeeded; DMA may go on if the device's state allows.</summary>
    void Unquiesce();

    /// <summary>Power-on state, migration state RUNNING. Its sessions were disposed before.</summary>
    /// <param name="reason">Who wants it.</param>
    /// <returns>Not None: the device is broken, its migration state becomes ERROR.</returns>
    ValueTask<Errno> Reset(VfioUserResetReason reason);

    /// <summary>The client is gone, its memory and eventfds with it. The device's state stays (vfio-user S-33).</summary>
    void ClientLost();

    /// <summary>
    /// Walks one arc of the migration state machine (vfio-user 8, direct arcs); acquiring and releasing what a device shares with its other end
    /// belongs into STOP to RUNNING and STOP_COPY to STOP (vfio-user S-52). Called while quiesced.
    /// </summary>
    /// <param name="from">State it is in.</param>
    /// <param name="to">The next one.</param>
    /// <returns>Not None: refused, the device is still in <paramref name="from"/>.</returns>
    ValueTask<Errno> Transition(VfioDeviceState from, VfioDeviceState to);

    /// <summary>Opens a saving session: after the arc into PRE_COPY, or into STOP_COPY when there was no PRE_COPY before.</summary>
    /// <returns>The session; the server disposes it when the saving states are left.</returns>
    IVfioUserSave OpenSave();

    /// <summary>Opens a resuming session, after the arc into RESUMING.</summary>
    /// <returns>The session; the server disposes it when RESUMING is left. Not committed before: the device is reset.</returns>
    IVfioUserLoad OpenLoad();
}
