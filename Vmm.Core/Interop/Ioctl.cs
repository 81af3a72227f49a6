using System.Buffers.Binary;
using System.Runtime.InteropServices;
using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

/// <summary>ioctl with the three argument forms that device nodes of the kernel use; EINTR retried. Nothing here throws for a refusal.</summary>
public static class Ioctl
{
    /// <summary>The argument is a plain number.</summary>
    /// <param name="fd">Descriptor.</param>
    /// <param name="request">Number of the ioctl.</param>
    /// <param name="value">The argument.</param>
    /// <param name="errno">Why it failed.</param>
    /// <returns>The result, or -1.</returns>
    public static int Invoke(OwnedFd fd, uint request, nint value, out Errno errno)
    {
        while (true)
        {
            int result = LibCExtra.ioctl(fd, request, value);
            errno = result >= 0 ? Errno.None : Posix.LastError;
            if (errno != Errno.EINTR) return result;
        }
    }

    /// <summary>As the plain form, but an interrupted call is not repeated: for calls that a signal is meant to end.</summary>
    /// <param name="fd">Descriptor.</param>
    /// <param name="request">Number of the ioctl.</param>
    /// <param name="errno">Why it failed; EINTR after a signal.</param>
    /// <returns>The result, or -1.</returns>
    internal static int InvokeOnce(OwnedFd fd, uint request, out Errno errno)
    {
        int result = LibCExtra.ioctl(fd, request, 0);
        errno = result >= 0 ? Errno.None : Posix.LastError;
        return result;
    }

    /// <summary>The argument is a structure given as bytes; the kernel may write into it.</summary>
    /// <param name="fd">Descriptor.</param>
    /// <param name="request">Number of the ioctl.</param>
    /// <param name="argument">The structure; long enough for what the kernel writes, as its <c>argsz</c> says.</param>
    /// <param name="errno">Why it failed.</param>
    /// <returns>The result, or -1.</returns>
    public static unsafe int Invoke(OwnedFd fd, uint request, Span<byte> argument, out Errno errno)
    {
        // SAFETY: the bytes are pinned for the call; the caller's argsz bounds what the kernel writes.
        fixed (byte* p = argument) return Invoke(fd, request, (nint)p, out errno);
    }

    /// <summary>The argument is a structure.</summary>
    /// <typeparam name="T">A structure with the kernel's layout.</typeparam>
    /// <param name="fd">Descriptor.</param>
    /// <param name="request">Number of the ioctl.</param>
    /// <param name="argument">The structure; the kernel may write into it.</param>
    /// <param name="errno">Why it failed.</param>
    /// <returns>The result, or -1.</returns>
    public static int Invoke<T>(OwnedFd fd, uint request, ref T argument, out Errno errno) where T : unmanaged =>
        Invoke(fd, request, AsBytes(ref argument), out errno);

    /// <summary>A structure as the bytes the kernel sees.</summary>
    /// <typeparam name="T">A structure with the kernel's layout.</typeparam>
    /// <param name="structure">The structure.</param>
    /// <returns>Its own bytes, not a copy.</returns>
    public static Span<byte> AsBytes<T>(ref T structure) where T : unmanaged => MemoryMarshal.AsBytes(new Span<T>(ref structure));

    /// <summary>An array of structures or words as the bytes the kernel sees.</summary>
    /// <typeparam name="T">A structure with the kernel's layout.</typeparam>
    /// <param name="array">The array.</param>
    /// <returns>Its own bytes, not a copy.</returns>
    public static Span<byte> AsBytes<T>(Span<T> array) where T : unmanaged => MemoryMarshal.AsBytes(array);

    /// <summary>Copies a structure out of bytes that the kernel wrote.</summary>
    /// <typeparam name="T">A structure with the kernel's layout.</typeparam>
    /// <param name="bytes">At least as long as the structure.</param>
    /// <returns>The structure.</returns>
    /// <exception cref="ArgumentOutOfRangeException">Too few bytes.</exception>
    public static T Read<T>(ReadOnlySpan<byte> bytes) where T : unmanaged => MemoryMarshal.Read<T>(bytes);

    /// <summary>The argument is a structure that holds the address of a second buffer.</summary>
    /// <param name="fd">Descriptor.</param>
    /// <param name="request">Number of the ioctl.</param>
    /// <param name="argument">The structure; the 8 bytes at <paramref name="pointerOffset"/> are filled in here.</param>
    /// <param name="pointerOffset">Where the structure keeps the address.</param>
    /// <param name="pointee">The second buffer; pinned for the call only, so the kernel must not keep its address.</param>
    /// <param name="errno">Why it failed.</param>
    /// <returns>The result, or -1.</returns>
    public static unsafe int Invoke(OwnedFd fd, uint request, Span<byte> argument, int pointerOffset, Span<byte> pointee, out Errno errno)
    {
        // SAFETY: both buffers are pinned for the call; the pointee's length is in the structure, set by the caller from the span.
        fixed (byte* p = argument, q = pointee)
        {
            BinaryPrimitives.WriteUInt64LittleEndian(argument[pointerOffset..], (ulong)q);
            return Invoke(fd, request, (nint)p, out errno);
        }
    }
}
