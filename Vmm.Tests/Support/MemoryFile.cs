using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Errors;

namespace Vmm.Tests.Support;

/// <summary>A file of fixed content in memory.</summary>
internal sealed class MemoryFile(byte[] content) : ISeekableChannel
{
    public string Name => "memory";

    public bool IsBidirectional => false;

    public bool PeerHasClosed => false;

    public long LengthBytes => content.Length;

    public long Position { get; set; }

    public int Read(Span<byte> destination)
    {
        int n = (int)Math.Clamp(content.Length - Position, 0, destination.Length);
        content.AsSpan((int)Math.Min(Position, content.Length), n).CopyTo(destination);
        Position += n;
        return n;
    }

    public void ReadAt(Span<byte> destination, long offset)
    {
        if (offset < 0 || offset > content.Length - destination.Length) throw new StreamTruncatedException($"{destination.Length} bytes at {offset} of {content.Length}");
        content.AsSpan((int)offset, destination.Length).CopyTo(destination);
    }

    public void Write(ReadOnlySpan<byte> source) => throw new NotSupportedException();

    public void WriteGather(GatherList parts) => throw new NotSupportedException();

    public void WriteAt(ReadOnlySpan<byte> source, long offset) => throw new NotSupportedException();

    public void Shutdown(ChannelShutdown how)
    {
    }

    public bool Drain(TimeSpan timeout) => true;

    public void Dispose()
    {
    }
}
