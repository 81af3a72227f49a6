using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>The data of one saving or resuming session: a stream, read or written in order by one thread at a time.</summary>
internal interface IVfioMigrationData : IDisposable
{
    /// <summary>Reads the next part of the device's state.</summary>
    /// <param name="destination">Where to; not empty.</param>
    /// <param name="errno">ENOMSG: nothing now, while the device runs. Anything else is a failure.</param>
    /// <returns>Bytes read; 0 at the end, or when there is nothing now and the device runs; -1 with an errno.</returns>
    int Read(Span<byte> destination, out Errno errno);

    /// <summary>Writes the next part of the device's state.</summary>
    /// <returns>Bytes taken, perhaps fewer; -1 with an errno.</returns>
    int Write(ReadOnlySpan<byte> source, out Errno errno);

    /// <summary>What is left while the device runs (uapi: <c>VFIO_MIG_GET_PRECOPY_INFO</c>).</summary>
    /// <returns>EINVAL outside the precopy states; ENOTTY when the backend has no such figures.</returns>
    Errno PrecopyInfo(out VfioPrecopyInfo info);
}
