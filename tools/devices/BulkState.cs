using System.Buffers.Binary;
using System.Numerics;

namespace Vmm.Tools.Devices;

/// <summary>Any number of pseudo-random bytes, which depend on the seed only. They are in pieces, because an array has at most 2 GiB.</summary>
internal sealed class BulkState
{
    private const int PieceBytes = 16 << 20;

    private readonly byte[][] _pieces;
    private readonly ulong _seed;
    private uint? _checksum;
    private bool _isOriginal;

    internal BulkState(ulong sizeBytes, ulong seed)
    {
        (SizeBytes, _seed) = (sizeBytes, seed);
        _pieces = new byte[(sizeBytes + PieceBytes - 1) / PieceBytes][];
        for (int i = 0; i < _pieces.Length; i++)
            _pieces[i] = GC.AllocateUninitializedArray<byte>((int)Math.Min(PieceBytes, sizeBytes - ((ulong)i * PieceBytes)));
        Reset();
    }

    internal ulong SizeBytes { get; }

    /// <summary>CRC-32C of all bytes; computed at the first call after a change.</summary>
    internal uint Checksum
    {
        get
        {
            if (_checksum is { } known) return known;
            uint crc = _pieces.Aggregate(uint.MaxValue, static (sum, piece) => Append(sum, piece));
            _checksum = ~crc;
            return ~crc;
        }
    }

    /// <summary>Restores the bytes of the seed if others were written.</summary>
    internal void Reset()
    {
        if (_isOriginal) return;
        Span<byte> last = stackalloc byte[8];
        ulong n = _seed;
        foreach (byte[] piece in _pieces)
        {
            Span<byte> rest = piece;
            for (; rest.Length >= 8; rest = rest[8..]) BinaryPrimitives.WriteUInt64LittleEndian(rest, DmaTestPattern.Mix(n++));
            BinaryPrimitives.WriteUInt64LittleEndian(last, DmaTestPattern.Mix(n++));
            last[..rest.Length].CopyTo(rest);
        }
        (_isOriginal, _checksum) = (true, null);
    }

    internal void Read(ulong offset, Span<byte> destination)
    {
        while (destination.Length > 0)
        {
            Span<byte> piece = Piece(offset, destination.Length);
            piece.CopyTo(destination);
            destination = destination[piece.Length..];
            offset += (uint)piece.Length;
        }
    }

    /// <summary>Returns the bytes from an offset to the end of their piece.</summary>
    internal ReadOnlyMemory<byte> Memory(ulong offset) => _pieces[offset / PieceBytes].AsMemory((int)(offset % PieceBytes));

    internal void Write(ulong offset, ReadOnlySpan<byte> source)
    {
        (_isOriginal, _checksum) = (false, null);
        while (source.Length > 0)
        {
            Span<byte> piece = Piece(offset, source.Length);
            source[..piece.Length].CopyTo(piece);
            source = source[piece.Length..];
            offset += (uint)piece.Length;
        }
    }

    private static uint Append(uint crc, ReadOnlySpan<byte> bytes)
    {
        for (; bytes.Length >= 8; bytes = bytes[8..]) crc = BitOperations.Crc32C(crc, BinaryPrimitives.ReadUInt64LittleEndian(bytes));
        foreach (byte one in bytes) crc = BitOperations.Crc32C(crc, one);
        return crc;
    }

    private Span<byte> Piece(ulong offset, int length)
    {
        byte[] piece = _pieces[offset / PieceBytes];
        int at = (int)(offset % PieceBytes);
        return piece.AsSpan(at, Math.Min(length, piece.Length - at));
    }
}
