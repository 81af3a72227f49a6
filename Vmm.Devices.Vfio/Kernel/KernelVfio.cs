using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>The real kernel.</summary>
internal sealed class KernelVfio : IVfioKernel
{
    public OwnedFd? Open(string path, out Errno errno) => Posix.Open(path, Posix.O_RDWR, 0, out errno);

    public Errno DeviceNumber(OwnedFd fd, out string number)
    {
        Errno errno = Posix.Stat(fd, out FileStatus stat);
        ulong device = stat.SpecialDevice;
        // The layout of dev_t in the C library: 12 low and 20 high bits of the major number, 8 low and 12 high of the minor one.
        ulong major = ((device >> 8) & 0xfff) | ((device >> 32) & 0xfffff000), minor = (device & 0xff) | ((device >> 12) & 0xffffff00);
        number = $"{major}:{minor}";
        return errno;
    }

    public int Ioctl(OwnedFd fd, uint request, nint value, out Errno errno) => Core.Interop.Ioctl.Invoke(fd, request, value, out errno);

    public int Ioctl(OwnedFd fd, uint request, Span<byte> argument, out Errno errno) => Core.Interop.Ioctl.Invoke(fd, request, argument, out errno);

    public int Ioctl(OwnedFd fd, uint request, Span<byte> argument, int pointerOffset, Span<byte> pointee, out Errno errno) =>
        Core.Interop.Ioctl.Invoke(fd, request, argument, pointerOffset, pointee, out errno);

    public int Read(OwnedFd fd, Span<byte> into, out Errno errno) => Posix.Read(fd, into, out errno);

    public int Write(OwnedFd fd, ReadOnlySpan<byte> from, out Errno errno) => Posix.Write(fd, from, out errno);

    public int PRead(OwnedFd fd, Span<byte> into, long offset, out Errno errno) => Posix.PRead(fd, into, offset, out errno);

    public int PWrite(OwnedFd fd, ReadOnlySpan<byte> from, long offset, out Errno errno) => Posix.PWrite(fd, from, offset, out errno);

    public MappedRegion Map(OwnedFd fd, ulong lengthBytes, long offset, string name, bool writable) =>
        MappedRegion.Map(fd, lengthBytes, shared: true, offset, name, writable);
}
