using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;

namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>
/// How one device is reached: kernel VFIO, vfio-user, or a fake. A refusal is a normal answer here and comes back as its <see cref="Errno"/>,
/// unchanged; exceptions are for a backend that is gone or broke its protocol. Thread-safe: region accesses, features and the migration data
/// may be used from several threads at once; state changes, interrupts and reset come with the BQL held.
/// </summary>
internal interface IVfioDeviceIo : IDisposable
{
    /// <summary>For logs and errors: <c>0000:01:00.0</c>, an mdev's UUID, or the socket's path.</summary>
    string Name { get; }

    /// <summary>Read once when the device was opened.</summary>
    VfioDeviceInfo Info { get; }

    /// <summary>How its DMA is mapped; shared by the devices of one address space, owned elsewhere.</summary>
    IVfioContainer Container { get; }

    /// <summary>Raised once when the device is gone for good (a vfio-user server ended or broke the protocol); on any thread, no lock held.</summary>
    event Action<VmmException>? Lost;

    /// <summary>Why the device is gone; null while it is there. Set before <see cref="Lost"/> is raised. Any thread.</summary>
    VmmException? LostReason => null;

    /// <summary>Why nobody can ask the device how it migrates; null when one can.</summary>
    string? NoMigrationReason => null;

    /// <summary>Region info; cached by the backend.</summary>
    /// <returns>An info of size 0 when there is no such region, whichever way the device reports that.</returns>
    VfioRegionInfo GetRegionInfo(uint index);

    /// <summary>Interrupt info; cached by the backend.</summary>
    /// <returns>Count 0 when there is none.</returns>
    VfioIrqInfo GetIrqInfo(uint index);

    /// <summary>
    /// Binds, masks, unmasks or triggers interrupts (uapi: <c>VFIO_DEVICE_SET_IRQS</c>). A backend splits requests that are too long for one message.
    /// </summary>
    /// <param name="request">What to do.</param>
    /// <param name="bools">One byte a vector with <see cref="VfioIrqSetFlags.DataBool"/>; else empty.</param>
    /// <param name="eventFds">One a vector with <see cref="VfioIrqSetFlags.DataEventFd"/>, null to unbind; else empty. Stay the caller's.</param>
    /// <returns>The device's answer.</returns>
    Errno SetIrqs(in VfioIrqSet request, ReadOnlySpan<byte> bools, ReadOnlySpan<OwnedFd?> eventFds);

    /// <summary>
    /// Whether <see cref="SetIrqs"/> can bind an eventfd that unmasks the pin. The kernel can, though not with each of its drivers; vfio-user cannot, so
    /// the caller must send an unmask request for each signal.
    /// </summary>
    bool TakesUnmaskEventFd { get; }

    /// <summary>A feature whose data are plain bytes. The migration state and the DMA log have calls of their own.</summary>
    /// <param name="feature">Feature.</param>
    /// <param name="op">Operation.</param>
    /// <param name="data">Data sent, and on success data received; exactly the structure's size; empty for PROBE.</param>
    /// <returns>ENOTTY when the device does not know the feature (vfio-user servers that answer EINVAL to a probe are translated).</returns>
    Errno DeviceFeature(VfioDeviceFeature feature, VfioFeatureOp op, Span<byte> data);

    /// <summary>Reads the migration state.</summary>
    /// <returns>The device's answer.</returns>
    Errno GetMigrationState(out VfioDeviceState state);

    /// <summary>Asks for a migration state; the device walks there by itself (vfio-migration 2). After a failure it may be anywhere on the way.</summary>
    /// <param name="state">Target.</param>
    /// <param name="data">A new session's data when the final step opened one, else null. The caller's to dispose.</param>
    /// <returns>The device's answer.</returns>
    Errno SetMigrationState(VfioDeviceState state, out IVfioMigrationData? data);

    /// <summary>Starts the device's log of DMA writes.</summary>
    /// <param name="pageSizeBytes">Wanted granularity.</param>
    /// <param name="ranges">Up to 256 disjoint ranges of DMA addresses.</param>
    /// <param name="inForceBytes">Granularity in force.</param>
    /// <returns>The device's answer.</returns>
    Errno StartDmaLog(ulong pageSizeBytes, IReadOnlyList<GuestRange> ranges, out ulong inForceBytes);

    /// <summary>Stops the log.</summary>
    /// <returns>The device's answer.</returns>
    Errno StopDmaLog();

    /// <summary>Reads and clears the log of one range.</summary>
    /// <param name="range">DMA addresses, page aligned.</param>
    /// <param name="pageSizeBytes">Granularity of the answer; the one in force.</param>
    /// <param name="bitmap">One bit a page, 64 a word, LSB first; set bits are added to what is there.</param>
    /// <returns>The device's answer; after any failure the log cannot be used any more.</returns>
    Errno ReportDmaLog(GuestRange range, ulong pageSizeBytes, Span<ulong> bitmap);

    /// <summary>Resets the device; its migration state becomes RUNNING and open sessions end.</summary>
    /// <returns>The device's answer.</returns>
    Errno Reset();

    /// <summary>Reads from a region by call, at the widest access the offset and length allow.</summary>
    /// <param name="index">Region.</param>
    /// <param name="offset">From its start.</param>
    /// <param name="destination">Filled completely on success; a short transfer is EINVAL.</param>
    /// <returns>The device's answer.</returns>
    Errno RegionRead(uint index, ulong offset, Span<byte> destination);

    /// <summary>Writes to a region by call.</summary>
    /// <param name="index">Region.</param>
    /// <param name="offset">From its start.</param>
    /// <param name="source">Bytes; a short transfer is EINVAL.</param>
    /// <param name="posted">The caller does not need the answer; a backend may then send without waiting, in order with everything else.</param>
    /// <returns>The device's answer; success for a posted write that was sent.</returns>
    Errno RegionWrite(uint index, ulong offset, ReadOnlySpan<byte> source, bool posted = false);

    /// <summary>Maps one area of a region for direct access.</summary>
    /// <param name="index">Region.</param>
    /// <param name="area">One of its areas.</param>
    /// <returns>The mapping, the caller's to dispose; null when the backend cannot map it and calls must be used.</returns>
    MappedRegion? MapArea(uint index, VfioRegionArea area);

    /// <summary>
    /// Says whether the guest allows the device to master the bus; a backend that carries DMA by messages refuses DMA while it does not. BQL: held.
    /// </summary>
    /// <param name="enabled">Bit 2 of the command register.</param>
    void SetBusMaster(bool enabled);
}
