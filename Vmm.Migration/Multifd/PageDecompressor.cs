using System.IO.Compression;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Wire;

namespace Vmm.Migration.Multifd;

/// <summary>Reads what a <see cref="PageCompressor"/> of the peer wrote. One thread.</summary>
internal abstract class PageDecompressor : IDisposable
{
    /// <summary>Makes the decompressor; null for none.</summary>
    internal static PageDecompressor? Of(MultifdSettings settings) => settings.Compression switch
    {
        MultifdCompression.Zlib => new Zlib(),
        MultifdCompression.Zstd => new Zstd(),
        _ => null,
    };

    /// <summary>Begins the payload of a packet, whose bytes stay valid until <see cref="End"/>.</summary>
    internal abstract void Begin(byte[] payload, int length);

    /// <summary>Decompresses the next bytes.</summary>
    /// <returns>False if the payload holds fewer.</returns>
    /// <exception cref="StreamFormatException">The payload is damaged.</exception>
    internal abstract bool TryRead(Span<byte> into);

    /// <summary>Ends a payload.</summary>
    /// <returns>Bytes that nobody has read.</returns>
    internal abstract int End();

    public abstract void Dispose();

    private sealed class Zlib : PageDecompressor
    {
        private readonly PayloadStream _payload = new();
        private readonly ZLibStream _stream;

        internal Zlib() => _stream = new ZLibStream(_payload, CompressionMode.Decompress);

        public override void Dispose() => _stream.Dispose();

        internal override void Begin(byte[] payload, int length) => _payload.Begin(payload, length);

        internal override bool TryRead(Span<byte> into)
        {
            try
            {
                return _stream.ReadAtLeast(into, into.Length, throwOnEndOfStream: false) == into.Length;
            }
            catch (InvalidDataException e)
            {
                throw new StreamFormatException($"zlib: {e.Message}", e);
            }
        }

        // The end of the last block may not have been read yet, although its pages are out.
        internal override int End()
        {
            Span<byte> none = stackalloc byte[1];
            return (TryRead(none) ? 1 : 0) + _payload.Left;
        }
    }

    private sealed class Zstd : PageDecompressor
    {
        private readonly ZstdStream _stream = ZstdStream.Decompressor(WireLimits.ZstdWindowLog);
        private byte[] _payload = [];
        private int _at, _end;

        public override void Dispose() => _stream.Dispose();

        internal override void Begin(byte[] payload, int length) => (_payload, _at, _end) = (payload, 0, length);

        internal override bool TryRead(Span<byte> into)
        {
            ReadOnlySpan<byte> left = _payload.AsSpan(_at, _end - _at);
            int n = _stream.Decompress(ref left, into);
            _at = _end - left.Length;
            return n == into.Length;
        }

        // The end of a block may be left when its last page is out.
        internal override int End()
        {
            if (_at == _end) return 0;
            ReadOnlySpan<byte> left = _payload.AsSpan(_at, _end - _at);
            Span<byte> none = stackalloc byte[1];
            return _stream.Decompress(ref left, none) + left.Length;
        }
    }

    /// <summary>Gives the bytes of one payload after the other; at the end of each it has no more for now.</summary>
    private sealed class PayloadStream : System.IO.Stream
    {
        private byte[] _payload = [];
        private int _at, _end;

        internal int Left => _end - _at;

        public override bool CanRead => true;

        public override bool CanSeek => false;

        public override bool CanWrite => false;

        public override long Length => throw new NotSupportedException();

        public override long Position { get => throw new NotSupportedException(); set => throw new NotSupportedException(); }

        internal void Begin(byte[] payload, int length) => (_payload, _at, _end) = (payload, 0, length);

        public override int Read(byte[] buffer, int offset, int count) => Read(buffer.AsSpan(offset, count));

        public override int Read(Span<byte> buffer)
        {
            int n = Math.Min(buffer.Length, Left);
            _payload.AsSpan(_at, n).CopyTo(buffer);
            _at += n;
            return n;
        }

        public override void Flush()
        {
        }

        public override long Seek(long offset, SeekOrigin origin) => throw new NotSupportedException();

        public override void SetLength(long value) => throw new NotSupportedException();

        public override void Write(byte[] buffer, int offset, int count) => throw new NotSupportedException();
    }
}
