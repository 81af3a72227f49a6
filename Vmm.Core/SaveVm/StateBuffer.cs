using System.Buffers;

namespace Vmm.Core.SaveVm;

/// <summary>
/// A pooled buffer of device state with one owner: who is given it disposes it or passes it on, so that the bytes are copied once, from the
/// channel. Not thread-safe; it moves from thread to thread with its ownership.
/// </summary>
public sealed class StateBuffer : IDisposable
{
    private byte[]? _bytes;

    private StateBuffer(byte[] bytes, int length) => (_bytes, Length) = (bytes, length);

    /// <summary>Bytes in use.</summary>
    public int Length { get; private set; }

    /// <summary>The content; invalid after <see cref="Dispose"/>.</summary>
    /// <exception cref="ObjectDisposedException">Given back already.</exception>
    public Span<byte> Span => (_bytes ?? throw new ObjectDisposedException(nameof(StateBuffer))).AsSpan(0, Length);

    /// <summary>Takes a buffer from the pool; its content is undefined.</summary>
    /// <param name="length">Bytes; bounded by the caller.</param>
    /// <returns>The buffer, the caller's.</returns>
    public static StateBuffer Rent(int length) => new(ArrayPool<byte>.Shared.Rent(length), length);

    /// <summary>Keeps only the first bytes.</summary>
    /// <param name="length">At most <see cref="Length"/>.</param>
    public void Trim(int length)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan((uint)length, (uint)Length);
        Length = length;
    }

    /// <summary>Gives it back; a second call does nothing.</summary>
    public void Dispose()
    {
        if (Interlocked.Exchange(ref _bytes, null) is { } bytes) ArrayPool<byte>.Shared.Return(bytes);
    }
}
