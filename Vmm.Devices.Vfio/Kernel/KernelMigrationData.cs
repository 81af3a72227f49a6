using System.Runtime.InteropServices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>The data descriptor of one saving or resuming session (vfio-migration 2). After the end of the session every call answers ENODEV.</summary>
/// <param name="kernel">System calls.</param>
/// <param name="fd">The descriptor; owned from here on.</param>
/// <param name="hasFlags">Feature MIG_PRECOPY_INFOv2 is on; without it the flags of the precopy info are undefined.</param>
internal sealed class KernelMigrationData(IVfioKernel kernel, OwnedFd fd, bool hasFlags) : IVfioMigrationData
{
    public int Read(Span<byte> destination, out Errno errno) => kernel.Read(fd, destination, out errno);

    public int Write(ReadOnlySpan<byte> source, out Errno errno) => kernel.Write(fd, source, out errno);

    public Errno PrecopyInfo(out VfioPrecopyInfo info)
    {
        var raw = new VfioUapi.PrecopyInfo { Argsz = (uint)Marshal.SizeOf<VfioUapi.PrecopyInfo>() };
        Errno errno = kernel.Call(fd, VfioUapi.VFIO_MIG_GET_PRECOPY_INFO, ref raw);
        info = errno == Errno.None
            ? new VfioPrecopyInfo(raw.InitialBytes, raw.DirtyBytes, hasFlags && (raw.Flags & VfioUapi.VFIO_PRECOPY_INFO_REINIT) != 0)
            : default;
        return errno;
    }

    public void Dispose() => fd.Dispose();
}
