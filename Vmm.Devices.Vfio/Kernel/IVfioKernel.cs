using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>
/// The system calls that reach a VFIO device of the host, and nothing else, so that tests can replace the kernel. Thread-safe. Calls retry on
/// EINTR; only <see cref="Map"/> throws when the kernel refuses.
/// </summary>
internal interface IVfioKernel
{
    /// <summary>Opens a device node for reading and writing, close-on-exec.</summary>
    /// <returns>The descriptor, or null.</returns>
    OwnedFd? Open(string path, out Errno errno);

    /// <summary>Reads the device number of an open node.</summary>
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
    /// <returns>Bytes, or -1.</returns>
    int Read(OwnedFd fd, Span<byte> into, out Errno errno);

    /// <summary>write(2).</summary>
    /// <returns>Bytes, or -1.</returns>
    int Write(OwnedFd fd, ReadOnlySpan<byte> from, out Errno errno);

    /// <summary>pread(2).</summary>
    /// <returns>Bytes, or -1.</returns>
    int PRead(OwnedFd fd, Span<byte> into, long offset, out Errno errno);

    /// <summary>pwrite(2).</summary>
    /// <returns>Bytes, or -1.</returns>
    int PWrite(OwnedFd fd, ReadOnlySpan<byte> from, long offset, out Errno errno);

    /// <summary>mmap(2), shared.</summary>
    /// <returns>The mapping.</returns>
    /// <exception cref="ChannelException">It failed.</exception>
    MappedRegion Map(OwnedFd fd, ulong lengthBytes, long offset, string name, bool writable);
}

/// <summary>Shorthands over <see cref="IVfioKernel"/>.</summary>
internal static class VfioKernelExtensions
{
    private const int LargestInfoBytes = 1 << 20;

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

    /// <summary>
    /// ioctl that answers with a structure and capabilities behind it. Asks again when <c>argsz</c>, the first word of the answer, says that it needs
    /// more room (vfio-migration 1.1).
    /// </summary>
    /// <param name="kernel">System calls.</param>
    /// <param name="fd">Descriptor.</param>
    /// <param name="request">Number of the ioctl.</param>
    /// <param name="structure">The request; its first word is filled in here. On success the answer.</param>
    /// <param name="answer">The whole answer.</param>
    /// <returns>EPROTO when <c>argsz</c> is larger than any real answer can be.</returns>
    internal static Errno CallForInfo<T>(this IVfioKernel kernel, OwnedFd fd, uint request, ref T structure, out byte[] answer) where T : unmanaged
    {
        answer = Ioctl.AsBytes(ref structure).ToArray();
        while (true)
        {
            BinaryPrimitives.WriteInt32LittleEndian(answer, answer.Length);
            kernel.Ioctl(fd, request, answer, out Errno errno);
            if (errno != Errno.None) return errno;
            uint needed = BinaryPrimitives.ReadUInt32LittleEndian(answer);
            if (needed > LargestInfoBytes) return Errno.EPROTO;
            if (needed <= answer.Length) break;
            answer = new byte[needed];
            Ioctl.AsBytes(ref structure).CopyTo(answer);
        }
        structure = Ioctl.Read<T>(answer);
        return Errno.None;
    }

    /// <summary>Calls with the descriptor's number, for use inside a structure; the descriptor stays open meanwhile.</summary>
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
