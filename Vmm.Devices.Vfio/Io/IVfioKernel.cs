using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;

namespace Vmm.Devices.Vfio.Io;

/// <summary>
/// The system calls that reach a VFIO device of the host, and nothing else, so that tests can answer them. Thread-safe. Calls retry EINTR and
/// never throw for a refusal, <see cref="Map"/> apart.
/// </summary>
internal interface IVfioKernel
{
    /// <summary>Opens a device node for reading and writing, close-on-exec.</summary>
    /// <param name="path">The node.</param>
    /// <param name="errno">Why it failed.</param>
    /// <returns>The descriptor, or null.</returns>
    OwnedFd? Open(string path, out Errno errno);

    /// <summary>Which device an open node is.</summary>
    /// <param name="fd">Descriptor.</param>
    /// <param name="number"><c>major:minor</c>, as sysfs writes it.</param>
    /// <returns>Why it failed.</returns>
    Errno DeviceNumber(OwnedFd fd, out string number);

    /// <summary>ioctl with a plain number.</summary>
    /// <param name="fd">Descriptor.</param>
    /// <param name="request">Number of the ioctl.</param>
    /// <param name="value">The argument.</param>
    /// <param name="errno">Why it failed.</param>
    /// <returns>The result, or -1.</returns>
    int Ioctl(OwnedFd fd, uint request, nint value, out Errno errno);

    /// <summary>ioctl with a structure.</summary>
    /// <param name="fd">Descriptor.</param>
    /// <param name="request">Number of the ioctl.</param>
    /// <param name="argument">The structure's bytes; the kernel may write into them.</param>
    /// <param name="errno">Why it failed.</param>
    /// <returns>The result, or -1.</returns>
    int Ioctl(OwnedFd fd, uint request, Span<byte> argument, out Errno errno);

    /// <summary>ioctl with a structure that holds the address of a second buffer.</summary>
    /// <param name="fd">Descriptor.</param>
    /// <param name="request">Number of the ioctl.</param>
    /// <param name="argument">The structure's bytes.</param>
    /// <param name="pointerOffset">Where the address goes.</param>
    /// <param name="pointee">The second buffer.</param>
    /// <param name="errno">Why it failed.</param>
    /// <returns>The result, or -1.</returns>
    int Ioctl(OwnedFd fd, uint request, Span<byte> argument, int pointerOffset, Span<byte> pointee, out Errno errno);

    /// <summary>read(2).</summary>
    /// <param name="fd">Descriptor.</param>
    /// <param name="into">Where to.</param>
    /// <param name="errno">Why it failed.</param>
    /// <returns>Bytes, or -1.</returns>
    int Read(OwnedFd fd, Span<byte> into, out Errno errno);

    /// <summary>write(2).</summary>
    /// <param name="fd">Descriptor.</param>
    /// <param name="from">Bytes.</param>
    /// <param name="errno">Why it failed.</param>
    /// <returns>Bytes, or -1.</returns>
    int Write(OwnedFd fd, ReadOnlySpan<byte> from, out Errno errno);

    /// <summary>pread(2).</summary>
    /// <param name="fd">Descriptor.</param>
    /// <param name="into">Where to.</param>
    /// <param name="offset">File offset.</param>
    /// <param name="errno">Why it failed.</param>
    /// <returns>Bytes, or -1.</returns>
    int PRead(OwnedFd fd, Span<byte> into, long offset, out Errno errno);

    /// <summary>pwrite(2).</summary>
    /// <param name="fd">Descriptor.</param>
    /// <param name="from">Bytes.</param>
    /// <param name="offset">File offset.</param>
    /// <param name="errno">Why it failed.</param>
    /// <returns>Bytes, or -1.</returns>
    int PWrite(OwnedFd fd, ReadOnlySpan<byte> from, long offset, out Errno errno);

    /// <summary>mmap(2), shared.</summary>
    /// <param name="fd">Descriptor.</param>
    /// <param name="lengthBytes">Bytes.</param>
    /// <param name="offset">File offset.</param>
    /// <param name="name">For the error.</param>
    /// <param name="writable">PROT_WRITE too.</param>
    /// <returns>The mapping.</returns>
    /// <exception cref="ChannelException">It failed.</exception>
    MappedRegion Map(OwnedFd fd, ulong lengthBytes, long offset, string name, bool writable);
}

/// <summary>Shorthands over <see cref="IVfioKernel"/>.</summary>
internal static class VfioKernelExtensions
{
    /// <summary>ioctl with a structure whose result is only success or failure.</summary>
    internal static Errno Call<T>(this IVfioKernel kernel, OwnedFd fd, uint request, ref T argument) where T : unmanaged
    {
        kernel.Ioctl(fd, request, Ioctl.AsBytes(ref argument), out Errno errno);
        return errno;
    }

    /// <summary>ioctl with a structure and a second buffer, whose result is only success or failure.</summary>
    internal static Errno Call<T>(this IVfioKernel kernel, OwnedFd fd, uint request, ref T argument, int pointerOffset, Span<byte> pointee) where T : unmanaged
    {
        kernel.Ioctl(fd, request, Ioctl.AsBytes(ref argument), pointerOffset, pointee, out Errno errno);
        return errno;
    }

    /// <summary>Uses a descriptor's number inside a structure; it stays open meanwhile.</summary>
    internal static T Lend<T>(this OwnedFd fd, Func<int, T> use)
    {
        bool held = false;
        try
        {
            fd.DangerousAddRef(ref held);
            return use(fd.Number);
        }
        finally
        {
            if (held) fd.DangerousRelease();
        }
    }
}
