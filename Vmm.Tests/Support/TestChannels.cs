using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Errors;

namespace Vmm.Tests.Support;

/// <summary>A channel without a peer, as a file is: reads come from given bytes, and writes are collected.</summary>
internal sealed class MemoryChannel(byte[]? input = null) : IMigrationChannel
{
    private readonly MemoryStream _output = new();
    private int _at;

    public string Name => "memory";

    public bool IsBidirectional => false;

    public bool PeerHasClosed => false;

    internal byte[] Written => _output.ToArray();

    internal int Unread => (input?.Length ?? 0) - _at;

    public int Read(Span<byte> destination)
    {
        int n = Math.Min(destination.Length, Unread);
        input.AsSpan(_at, n).CopyTo(destination);
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

/// <summary>Returns one byte per read, so that a reader fails if it expects a value in one read.</summary>
internal sealed class OneByteChannel(IMigrationChannel inner) : IMigrationChannel
{
    public string Name => inner.Name;

    public bool IsBidirectional => inner.IsBidirectional;

    public bool PeerHasClosed => inner.PeerHasClosed;

    public int Read(Span<byte> destination) => inner.Read(destination[..1]);

    public void Write(ReadOnlySpan<byte> source) => inner.Write(source);

    public void WriteGather(GatherList parts) => inner.WriteGather(parts);

    public void Shutdown(ChannelShutdown how) => inner.Shutdown(how);

    public bool Drain(TimeSpan timeout) => inner.Drain(timeout);

    public void Dispose() => inner.Dispose();
}

/// <summary>Fails every write after a number of bytes and shuts down the inner channel, as a lost link does.</summary>
internal sealed class FaultyChannel(IMigrationChannel inner, long cutAfterBytes) : IMigrationChannel
{
    private long _written;

    public string Name => inner.Name;

    public bool IsBidirectional => inner.IsBidirectional;

    public bool PeerHasClosed => inner.PeerHasClosed;

    public int Read(Span<byte> destination) => inner.Read(destination);

    public void Write(ReadOnlySpan<byte> source)
    {
        Count(source.Length);
        inner.Write(source);
    }

    public void WriteGather(GatherList parts)
    {
        try
        {
            Count(parts.PendingBytes);
        }
        catch (ChannelException)
        {
            parts.Clear();
            throw;
        }
        inner.WriteGather(parts);
    }

    public void Shutdown(ChannelShutdown how) => inner.Shutdown(how);

    public bool Drain(TimeSpan timeout) => inner.Drain(timeout);

    public void Dispose() => inner.Dispose();

    private void Count(long bytes)
    {
        _written += bytes;
        if (_written <= cutAfterBytes) return;
        inner.Shutdown(ChannelShutdown.Both);
        throw new ChannelException($"{Name}: the link was cut after {cutAfterBytes} bytes", Errno.ECONNRESET);
    }
}

/// <summary>Keeps a copy of everything written.</summary>
internal sealed class RecordingChannel(IMigrationChannel inner) : IMigrationChannel
{
    private readonly MemoryStream _written = new();

    public string Name => inner.Name;

    public bool IsBidirectional => inner.IsBidirectional;

    public bool PeerHasClosed => inner.PeerHasClosed;

    internal byte[] Written => _written.ToArray();

    public int Read(Span<byte> destination) => inner.Read(destination);

    public void Write(ReadOnlySpan<byte> source)
    {
        _written.Write(source);
        inner.Write(source);
    }

    public void WriteGather(GatherList parts)
    {
        for (int i = 0; i < parts.Count; i++) _written.Write(parts.Segment(i));
        inner.WriteGather(parts);
    }

    public void Shutdown(ChannelShutdown how) => inner.Shutdown(how);

    public bool Drain(TimeSpan timeout) => inner.Drain(timeout);

    public void Dispose() => inner.Dispose();
}

/// <summary>A capture as a channel with a return path: reads come from the capture, and writes are collected.</summary>
internal sealed class GoldenChannel(byte[] input) : IMigrationChannel
{
    private readonly MemoryChannel _inner = new(input);

    public string Name => "golden";

    public bool IsBidirectional => true;

    public bool PeerHasClosed => false;

    internal int Unread => _inner.Unread;

    internal byte[] Written => _inner.Written;

    public int Read(Span<byte> destination) => _inner.Read(destination);

    public void Write(ReadOnlySpan<byte> source) => _inner.Write(source);

    public void WriteGather(GatherList parts) => _inner.WriteGather(parts);

    public void Shutdown(ChannelShutdown how) => _inner.Shutdown(how);

    public bool Drain(TimeSpan timeout) => true;

    public void Dispose()
    {
    }
}
