using System.Buffers.Binary;
using Vmm.Core.Channels;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Migration.Viewer;

/// <summary>
/// Finds VMDESC from the end of a file (stream 1.6): <c>06 u32:length</c> whose text ends exactly at the end of the file. If there is none, takes the
/// last place where <c>00 06 u32:length</c> frames a text in braces, because bytes may follow VMDESC.
/// </summary>
internal static class VmDescriptionFinder
{
    private const int ChunkBytes = 64 << 10;
    private const int HeadBytes = 5;

    /// <summary>Searches backwards, over at most <see cref="WireLimits.ViewerVmDescBytes"/>.</summary>
    /// <returns>File offset of the byte 06 and length of the text, or null.</returns>
    internal static (long Offset, int LengthBytes)? Find(ISeekableChannel file)
    {
        long end = file.LengthBytes;
        long lowest = Math.Max(0, end - WireLimits.ViewerVmDescBytes - HeadBytes);
        (long, int)? inside = null;
        // Chunks overlap, so that one of them contains a whole head that crosses their border.
        byte[] buffer = new byte[ChunkBytes + HeadBytes + 1];
        for (long top = end; top > lowest; top -= ChunkBytes)
        {
            long from = Math.Max(lowest, top - ChunkBytes);
            int count = (int)(Math.Min(end, top + HeadBytes + 1) - from);
            file.ReadAt(buffer.AsSpan(0, count), from);
            ReadOnlySpan<byte> chunk = buffer.AsSpan(0, count);
            for (int at = (int)(top - from); (at = chunk[..at].LastIndexOf((byte)SectionType.VmDescription)) >= 0;)
            {
                if (count - at < HeadBytes + 1 || chunk[at + HeadBytes] != '{') continue;
                long length = BinaryPrimitives.ReadUInt32BigEndian(chunk[(at + 1)..]);
                long textEnd = from + at + HeadBytes + length;
                if (length > WireLimits.ViewerVmDescBytes || textEnd > end) continue;
                if (textEnd == end) return (from + at, (int)length);
                if (inside is null && from + at > 0 && Byte(file, from + at - 1) == 0 && Byte(file, textEnd - 1) == '}') inside = (from + at, (int)length);
            }
        }
        return inside;
    }

    private static byte Byte(ISeekableChannel file, long offset)
    {
        Span<byte> one = stackalloc byte[1];
        file.ReadAt(one, offset);
        return one[0];
    }
}
