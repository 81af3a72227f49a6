using System.Buffers.Binary;
using System.Numerics;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Wire;

namespace Vmm.Migration.Ram;

/// <summary>Reads the pages of one block from a mapped-ram file (stream 5.2; QEMU: <c>parse_ramblock_mapped_ram</c>).</summary>
internal static class MappedRamLoad
{
    private const int PageSize = RamBlock.PageSize;

    /// <summary>Most pages that one read takes, and words of the bitmap that are read at once.</summary>
    private const int RunPages = 256, BitmapWords = 512;

    /// <summary>Reads a block's pages and moves the stream behind them.</summary>
    /// <param name="f">The stream, behind the block's header.</param>
    /// <param name="block">The block; null to read nothing.</param>
    /// <param name="entry">What the block list says of the block.</param>
    /// <param name="header">The entry's header.</param>
    /// <param name="mayHaveMemory">Pages that may not be zero, of which those that are not in the file are made zero; the others are added.</param>
    /// <exception cref="StreamFormatException">Bitmap or pages are not where they can be.</exception>
    internal static void Load(QemuFileReader f, RamBlock? block, RamBlockEntry entry, MappedRamHeader header, DirtyBitmap mayHaveMemory)
    {
        if (f.Channel is not ISeekableChannel file) throw f.Bad("mapped-ram", "a file", f.Channel.Name);
        Check(f, file, entry.Name, entry.UsedLength, header);
        if (block is not null) LoadPages(f, file, block, header, mayHaveMemory);
        f.Seek(f.Position + ((long)(header.PagesOffset + entry.UsedLength) - f.FileOffset));
    }

    /// <summary>The numbers come from the file: bitmap and pages follow the header, in this order, and end inside the file.</summary>
    private static void Check(QemuFileReader f, ISeekableChannel file, string name, ulong lengthBytes, MappedRamHeader header)
    {
        long at = f.Position - MappedRamHeader.SizeBytes;
        ulong fileBytes = (ulong)file.LengthBytes, bitmapBytes = MappedRamHeader.BitmapBytes(lengthBytes / PageSize);
        if (header.PageSize != PageSize) throw f.Bad($"mapped-ram page size of RAM block '{name}'", $"{PageSize}", $"{header.PageSize}", at);
        if (header.PagesOffset % PageSize != 0 || header.PagesOffset > fileBytes || lengthBytes > fileBytes - header.PagesOffset)
            throw f.Bad($"pages of RAM block '{name}'", $"a range at a page boundary inside the file of 0x{fileBytes:x} bytes", $"0x{header.PagesOffset:x}+0x{lengthBytes:x}", at);
        if (header.BitmapOffset < (ulong)f.FileOffset || header.BitmapOffset > header.PagesOffset || bitmapBytes > header.PagesOffset - header.BitmapOffset)
            throw f.Bad($"bitmap of RAM block '{name}'", $"a range between this header and its pages at 0x{header.PagesOffset:x}", $"0x{header.BitmapOffset:x}+0x{bitmapBytes:x}", at);
    }

    private static void LoadPages(QemuFileReader f, ISeekableChannel file, RamBlock block, MappedRamHeader header, DirtyBitmap mayHaveMemory)
    {
        bool isFresh = mayHaveMemory.FindNext(0) == mayHaveMemory.PageCount;
        byte[] bitmap = new byte[BitmapWords * 8];
        long first = 0, count = 0;
        for (int word = 0; word < mayHaveMemory.WordCount; word++)
        {
            int at = word % BitmapWords * 8;
            if (at == 0) file.ReadAt(bitmap.AsSpan(0, Math.Min(bitmap.Length, (mayHaveMemory.WordCount - word) * 8)), (long)header.BitmapOffset + (word * 8L));
            // Words in the order of QEMU's host.
            ulong present = BinaryPrimitives.ReadUInt64LittleEndian(bitmap.AsSpan(at));
            long page = (long)word << 6;
            int pages = (int)Math.Min(64, block.PageCount - page);
            if (pages < 64 && present >> pages != 0) throw f.Bad($"bitmap of RAM block '{block.Name}'", $"bits for {block.PageCount} pages", "more bits");
            if (!isFresh) ClearMissing(block, page, pages, present, mayHaveMemory);
            for (ulong marks = present; marks != 0;)
            {
                int from = BitOperations.TrailingZeroCount(marks), run = BitOperations.TrailingZeroCount(~(marks >> from));
                marks = from + run == 64 ? 0 : marks & (ulong.MaxValue << (from + run));
                if (page + from != first + count || count + run > RunPages)
                {
                    Read(file, block, header, first, count);
                    (first, count) = (page + from, 0);
                }
                count += run;
            }
            mayHaveMemory.OrWord(word, present);
        }
        Read(file, block, header, first, count);
    }

    private static void Read(ISeekableChannel file, RamBlock block, MappedRamHeader header, long first, long count)
    {
        if (count > 0) file.ReadAt(block.Slice((ulong)first * PageSize, (int)count * PageSize), (long)header.PagesOffset + (first * PageSize));
    }

    /// <summary>A page that is not in the file is zero. An attempt before this one may have written it.</summary>
    private static void ClearMissing(RamBlock block, long first, int pages, ulong present, DirtyBitmap mayHaveMemory)
    {
        for (int i = 0; i < pages; i++)
        {
            if ((present >> i & 1) != 0 || !mayHaveMemory.IsSet(first + i) || block.IsZeroPage(first + i)) continue;
            block.Slice((ulong)(first + i) * PageSize, PageSize).Clear();
        }
    }
}
