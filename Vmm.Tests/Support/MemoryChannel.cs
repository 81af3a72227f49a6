using Vmm.Core.Buffers;
using Vmm.Core.Channels;

namespace Vmm.Tests.Support;

/// <summary>A channel over byte arrays: reads what it was given, then reports the end; collects what is written.</summary>
internal sealed class MemoryChannel(byte[]? input = null, int maxReadBytes = int.MaxValue) : IMigrationChannel
{
    private readonly byte[] _input = input ?? [];
    private readonly MemoryStream _output = new();
    private int _at;

    public string Name => "memory";

    public bool IsBidirectional => false;

    public bool PeerHasClosed => false;

    /// <summary>Bytes of the input not yet read by anyone.</summary>
    public int Remaining => _input.Length - _at;

    /// <summary>Everything written so far.</summary>
    public byte[] Written => _output.ToArray();

    public int Read(Span<byte> destination)
    {
        int n = Math.Min(Math.Min(destination.Length, Remaining), maxReadBytes);
        _input.AsSpan(_at, n).CopyTo(destination);
        _at += n;
        return n;
    }

    public void Write(ReadOnlySpan<byte> source) => _output.Write(source);

    public void WriteGather(GatherList parts)
    {
        for (int i = 0; i < parts.Count; i++) _output.Write(parts.Segment(i));
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
