using System.Buffers;

namespace Vmm.Core.SaveVm;

/// <summary>
/// A pooled buffer of device state with one owner, who disposes it or passes it on. The bytes are therefore copied only once, from the channel. Not
/// thread-safe; it moves from thread to thread with its ownership.
/// </summary>
public sealed class StateBuffer : IDisposable
{
    private byte[]? _bytes;

    private StateBuffer(byte[] bytes, int length) => (_bytes, Length) = (bytes, length);

    /// <summary>Bytes in use.</summary>
    public int Length { get; private set; }

    /// <summary>The content; invalid after <see cref="Dispose"/>.</summary>
    /// <exception cref="ObjectDisposedException">The buffer is back in the pool.</exception>
    public Span<byte> Span => (_bytes ?? throw new ObjectDisposedException(nameof(StateBuffer))).AsSpan(0, Length);

    /// <summary>Takes a buffer of <paramref name="length"/> bytes, which the caller must bound, from the pool; its content is undefined.</summary>
    public static StateBuffer Rent(int length) => new(ArrayPool<byte>.Shared.Rent(length), length);

    /// <summary>Keeps only the first <paramref name="length"/> bytes.</summary>
    /// <exception cref="ArgumentOutOfRangeException">More than <see cref="Length"/>.</exception>
    public void Trim(int length)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan((uint)length, (uint)Length);
        Length = length;
    }

    /// <summary>Returns the buffer to the pool; a second call does nothing.</summary>
    public void Dispose()
    {
        if (Interlocked.Exchange(ref _bytes, null) is { } bytes) ArrayPool<byte>.Shared.Return(bytes);
    }
}
