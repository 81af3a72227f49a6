using Vmm.Core.Buffers;

namespace Vmm.Core.Channels;

/// <summary>A channel over a memory stream: device state, never RAM, is written first and read afterwards. One thread.</summary>
internal sealed class MemoryStreamChannel : IMigrationChannel
{
    private readonly MemoryStream _stream = new();

    public string Name => "memory";

    public bool IsBidirectional => false;

    public bool PeerHasClosed => false;

    /// <summary>Returns to the first byte, to read what was written.</summary>
    internal void Rewind() => _stream.Position = 0;

    public int Read(Span<byte> destination) => _stream.Read(destination);

    public void Write(ReadOnlySpan<byte> source) => _stream.Write(source);

    public void WriteGather(GatherList parts)
    {
        for (int i = 0; i < parts.Count; i++) _stream.Write(parts.Segment(i));
        parts.Clear();
    }

    public void Shutdown(ChannelShutdown how)
    {
    }

    public bool Drain(TimeSpan timeout) => true;

    public void Dispose() => _stream.Dispose();
}
