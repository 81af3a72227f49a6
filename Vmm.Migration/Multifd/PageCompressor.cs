using System.IO.Compression;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Multifd;

/// <summary>Compresses the pages of one channel: one endless stream, flushed at the end of each packet (stream 4.5). One thread.</summary>
internal abstract class PageCompressor : IDisposable
{
    /// <summary>The guest may write a page while it is compressed, which zlib does not endure; so a copy is.</summary>
    private readonly byte[] _page = new byte[RamBlock.PageSize];

    /// <summary>Makes the compressor; null for none.</summary>
    internal static PageCompressor? Of(MultifdSettings settings) => settings.Compression switch
    {
        MultifdCompression.Zlib => new Zlib(settings.Level),
        MultifdCompression.Zstd => new Zstd(settings.Level),
        _ => null,
    };

    /// <summary>Compresses pages of a block.</summary>
    /// <returns>The payload of the packet; valid until the next call.</returns>
    internal ReadOnlySpan<byte> Compress(RamBlock block, ReadOnlySpan<long> pages)
    {
        Begin();
        for (int i = 0; i < pages.Length; i++)
        {
            block.ReadOnlySlice((ulong)pages[i] * RamBlock.PageSize, RamBlock.PageSize).CopyTo(_page);
            Add(_page, isLast: i == pages.Length - 1);
        }
        return End();
    }

    public abstract void Dispose();

    protected abstract void Begin();

    protected abstract void Add(ReadOnlySpan<byte> page, bool isLast);

    protected abstract ReadOnlySpan<byte> End();

    private sealed class Zlib : PageCompressor
    {
        private readonly MemoryStream _output = new(MultifdPacket.PagesAllocated * RamBlock.PageSize);
        private readonly ZLibStream _stream;

        internal Zlib(int level) => _stream = new ZLibStream(_output, new ZLibCompressionOptions { CompressionLevel = level }, leaveOpen: true);

        public override void Dispose()
        {
            _stream.Dispose();
            _output.Dispose();
        }

        protected override void Begin() => _output.SetLength(0);

        protected override void Add(ReadOnlySpan<byte> page, bool isLast)
        {
            _stream.Write(page);
            if (isLast) _stream.Flush();
        }

        protected override ReadOnlySpan<byte> End() => _output.GetBuffer().AsSpan(0, (int)_output.Length);
    }

    private sealed class Zstd(int level) : PageCompressor
    {
        private readonly ZstdStream _stream = ZstdStream.Compressor(level);
        private readonly byte[] _output = GC.AllocateUninitializedArray<byte>(ZstdStream.Bound(MultifdPacket.PagesAllocated * RamBlock.PageSize), pinned: true);
        private int _length;

        public override void Dispose() => _stream.Dispose();

        protected override void Begin() => _length = 0;

        protected override void Add(ReadOnlySpan<byte> page, bool isLast) => _length += _stream.Compress(page, _output.AsSpan(_length), isLast);

        protected override ReadOnlySpan<byte> End() => _output.AsSpan(0, _length);
    }
}
