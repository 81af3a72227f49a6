using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Wire;

namespace Vmm.Migration.Ram;

/// <summary>
/// Puts each page at its own place in a file, where a later copy replaces it, and says in a bitmap which pages are there (stream 5; QEMU: <c>mapped-ram</c>).
/// Pages that follow each other go in one write. One thread.
/// </summary>
/// <param name="f">The stream; its channel is the file.</param>
internal sealed class MappedRamSave(QemuFileWriter f)
{
    private const int PageSize = RamBlock.PageSize;

    /// <summary>Most pages that one write takes: 1 MiB.</summary>
    private const int RunPages = 256;

    /// <summary>The pages of each block begin at a multiple of this (QEMU: <c>MAPPED_RAM_FILE_OFFSET_ALIGNMENT</c>).</summary>
    private const long PagesAlignment = 1 << 20;

    private readonly ISeekableChannel _file = f.Channel as ISeekableChannel ?? throw new ConfigurationException(NotSeekable);
    private readonly Dictionary<RamBlock, Place> _places = [];
    private Place? _place;
    private long _first;
    private int _count;

    /// <summary>QEMU's words for a channel that is no file.</summary>
    internal const string NotSeekable = "Migration requires seekable transport (e.g. file)";

    /// <summary>Writes a block's header, and leaves room for its bitmap and its pages.</summary>
    internal void AddBlock(RamBlock block, bool isIgnored)
    {
        // Offsets are those of the file, wherever in it the stream begins.
        f.Flush();
        long bitmapOffset = isIgnored ? 0 : _file.Position + MappedRamHeader.SizeBytes;
        byte[] bitmap = new byte[MappedRamHeader.BitmapBytes((ulong)block.PageCount)];
        long pagesOffset = isIgnored ? 0 : (bitmapOffset + bitmap.Length + PagesAlignment - 1) / PagesAlignment * PagesAlignment;
        f.WriteUInt32(MappedRamHeader.Version);
        f.WriteUInt64(PageSize);
        f.WriteUInt64((ulong)bitmapOffset);
        f.WriteUInt64((ulong)pagesOffset);
        if (isIgnored) return;
        _places[block] = new Place(block, bitmap, bitmapOffset, pagesOffset);
        f.Flush();
        _file.Position = pagesOffset + (long)block.SizeBytes;
    }

    /// <summary>Takes a page that is dirty: its content goes with the next <see cref="Flush"/> at the latest. A zero page takes no room.</summary>
    internal void Save(RamBlock block, long page, bool isZero)
    {
        if (!ReferenceEquals(_place?.Block, block))
        {
            Flush();
            _place = _places[block];
        }
        ref byte marks = ref _place!.Bitmap[page >> 3];
        int bit = 1 << (int)(page & 7);
        if (isZero)
        {
            marks &= (byte)~bit;
            return;
        }
        marks |= (byte)bit;
        if (_count == RunPages || page != _first + _count) Flush();
        if (_count == 0) _first = page;
        _count++;
    }

    /// <summary>Writes the pages that were taken.</summary>
    /// <exception cref="ChannelException">The file took them not.</exception>
    internal void Flush()
    {
        if (_count == 0) return;
        long offset = _first * PageSize;
        int length = _count * PageSize;
        _count = 0;
        _file.WriteAt(_place!.Block.ReadOnlySlice((ulong)offset, length), _place.PagesOffset + offset);
        f.NoteMoved(length);
    }

    /// <summary>Writes the pages that were taken and all bitmaps, which nothing can change any more.</summary>
    internal void End()
    {
        Flush();
        foreach (Place place in _places.Values)
        {
            _file.WriteAt(place.Bitmap, place.BitmapOffset);
            f.NoteMoved(place.Bitmap.Length);
        }
    }

    /// <summary>Where a block stands in the file, and which of its pages do: words in the order of the host, which on x86 are bytes with the lowest bit first.</summary>
    private sealed record Place(RamBlock Block, byte[] Bitmap, long BitmapOffset, long PagesOffset);
}
