using System.Buffers.Binary;
using System.Runtime.InteropServices;
using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

/// <summary>
/// ioctl(2) with the argument forms of the kernel's device nodes; EINTR is retried. A failed call returns -1 and sets <c>errno</c>; nothing throws.
/// </summary>
public static class Ioctl
{
    /// <summary>Calls an ioctl whose argument is a number.</summary>
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

    /// <summary>Calls an ioctl without argument and does not retry EINTR, for calls that a signal is meant to interrupt.</summary>
    /// <returns>The result, or -1.</returns>
    internal static int InvokeOnce(OwnedFd fd, uint request, out Errno errno)
    {
        int result = LibCExtra.ioctl(fd, request, 0);
        errno = result >= 0 ? Errno.None : Posix.LastError;
        return result;
    }

    /// <summary>
    /// Calls an ioctl whose argument is a structure, given as bytes. The bytes must be long enough for what the kernel writes (its <c>argsz</c>).
    /// </summary>
    /// <returns>The result, or -1.</returns>
    public static unsafe int Invoke(OwnedFd fd, uint request, Span<byte> argument, out Errno errno)
    {
        // SAFETY: the bytes are pinned for the call; the caller's argsz bounds what the kernel writes.
        fixed (byte* p = argument) return Invoke(fd, request, (nint)p, out errno);
    }

    /// <summary>Calls an ioctl whose argument is a structure; the kernel may write into it.</summary>
    /// <returns>The result, or -1.</returns>
    public static int Invoke<T>(OwnedFd fd, uint request, ref T argument, out Errno errno) where T : unmanaged =>
        Invoke(fd, request, AsBytes(ref argument), out errno);

    /// <summary>Returns a structure as the bytes that the kernel sees.</summary>
    /// <returns>Its own bytes, not a copy.</returns>
    public static Span<byte> AsBytes<T>(ref T structure) where T : unmanaged => MemoryMarshal.AsBytes(new Span<T>(ref structure));

    /// <summary>Returns an array of structures or words as the bytes that the kernel sees.</summary>
    /// <returns>Its own bytes, not a copy.</returns>
    public static Span<byte> AsBytes<T>(Span<T> array) where T : unmanaged => MemoryMarshal.AsBytes(array);

    /// <summary>Copies a structure out of bytes that the kernel wrote.</summary>
    /// <param name="bytes">At least as long as the structure.</param>
    /// <exception cref="ArgumentOutOfRangeException">Too few bytes.</exception>
    public static T Read<T>(ReadOnlySpan<byte> bytes) where T : unmanaged => MemoryMarshal.Read<T>(bytes);

    /// <summary>
    /// Calls an ioctl whose argument is a structure with the address of a second buffer. This method writes the address of <paramref name="pointee"/> into
    /// the 8 bytes at <paramref name="pointerOffset"/>. The buffer is pinned only during the call, so the kernel must not keep its address.
    /// </summary>
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
