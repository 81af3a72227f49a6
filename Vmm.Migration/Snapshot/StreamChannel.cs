using Vmm.Core.Buffers;
using Vmm.Core.Channels;

namespace Vmm.Migration.Snapshot;

/// <summary>A channel over a stream in memory; holds device state, never RAM.</summary>
internal sealed class StreamChannel(MemoryStream stream) : IMigrationChannel
{
    public string Name => "memory";

    public bool IsBidirectional => false;

    public bool PeerHasClosed => false;

    public int Read(Span<byte> destination) => stream.Read(destination);

    public void Write(ReadOnlySpan<byte> source) => stream.Write(source);

    public void WriteGather(GatherList parts)
    {
        for (int i = 0; i < parts.Count; i++) stream.Write(parts.Segment(i));
        parts.Clear();
    }

    public void Shutdown(ChannelShutdown how)
    {
    }

    public bool Drain(TimeSpan timeout) => true;

    public void Dispose()
    {
    }
}
