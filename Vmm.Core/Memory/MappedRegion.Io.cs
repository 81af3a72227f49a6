namespace Vmm.Core.Memory;

public sealed unsafe partial class MappedRegion
{
    /// <summary>Reads a device register; an aligned read is one load of exactly this width. May race with disposal.</summary>
    /// <param name="offset">Offset in the mapping, bytes.</param>
    /// <param name="size">1, 2, 4 or 8 bytes.</param>
    /// <param name="value">Little-endian.</param>
    /// <returns>False if the mapping is disposed or the range is not inside it.</returns>
    /// <exception cref="ArgumentOutOfRangeException">Another size.</exception>
    public bool TryReadIo(ulong offset, int size, out ulong value)
    {
        value = 0;
        bool held = false;
        try
        {
            if (!TryHold(offset, size, ref held)) return false;
            // SAFETY: the range is inside the mapping, which the reference taken above keeps mapped until the end of this method.
            byte* at = Address + offset;
            value = size switch
            {
                1 => Volatile.Read(ref *at),
                2 => Volatile.Read(ref *(ushort*)at),
                4 => Volatile.Read(ref *(uint*)at),
                8 => Volatile.Read(ref *(ulong*)at),
                _ => throw new ArgumentOutOfRangeException(nameof(size)),
            };
            return true;
        }
        finally
        {
            if (held) DangerousRelease();
        }
    }

    /// <summary>Writes a device register; an aligned write is one store of exactly this width. May race with disposal.</summary>
    /// <param name="offset">Offset in the mapping, bytes.</param>
    /// <param name="size">1, 2, 4 or 8 bytes.</param>
    /// <param name="value">Little-endian.</param>
    /// <returns>False if the mapping is read-only or disposed, or the range is not inside it.</returns>
    /// <exception cref="ArgumentOutOfRangeException">Another size.</exception>
    public bool TryWriteIo(ulong offset, int size, ulong value)
    {
        bool held = false;
        try
        {
            if (!IsWritable || !TryHold(offset, size, ref held)) return false;
            // SAFETY: the range is inside the mapping, which the reference taken above keeps mapped until the end of this method.
            byte* at = Address + offset;
            switch (size)
            {
                case 1: Volatile.Write(ref *at, (byte)value); break;
                case 2: Volatile.Write(ref *(ushort*)at, (ushort)value); break;
                case 4: Volatile.Write(ref *(uint*)at, (uint)value); break;
                case 8: Volatile.Write(ref *(ulong*)at, value); break;
                default: throw new ArgumentOutOfRangeException(nameof(size));
            }
            return true;
        }
        finally
        {
            if (held) DangerousRelease();
        }
    }

    private bool TryHold(ulong offset, int size, ref bool held)
    {
        if (offset > LengthBytes || (ulong)size > LengthBytes - offset || IsClosed) return false;
        try
        {
            DangerousAddRef(ref held);
        }
        catch (ObjectDisposedException)
        {
            return false; // Another thread disposed the mapping after the check.
        }
        return true;
    }
}
