using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Errors;

namespace Vmm.Tests.Faults;

/// <summary>What a <see cref="FaultChannel"/> does; a seed decides it.</summary>
/// <param name="ReadFailsAt">The position at which reads fail; <see cref="long.MaxValue"/> for never.</param>
/// <param name="WriteFailsAt">The same for writes.</param>
/// <param name="Errno">The failure; <see cref="Errno.None"/> for the end of the stream at a read, and for EPIPE at a write.</param>
/// <param name="ReadMost">The longest read, in bytes.</param>
/// <param name="WriteMost">The longest piece of a write.</param>
/// <param name="Seed">Seed of the lengths.</param>
internal sealed record ChannelFault(long ReadFailsAt, long WriteFailsAt, Errno Errno, int ReadMost, int WriteMost, int Seed)
{
    private static readonly Errno[] s_errors = [Errno.None, Errno.ECONNRESET, Errno.EPIPE, Errno.EIO, Errno.ENOSPC, Errno.ETIMEDOUT];

    /// <summary>Chooses a fault for a stream of about this length: in one direction, or only short reads and writes.</summary>
    internal static ChannelFault Of(Random random, long streamBytes)
    {
        long at = random.Next(3) == 0 ? streamBytes - random.Next(2000) : (long)Math.Exp(random.NextDouble() * Math.Log(streamBytes));
        int direction = random.Next(4);
        return new ChannelFault(direction == 1 ? random.Next(24) : direction == 3 ? at : long.MaxValue, direction == 2 ? at : long.MaxValue, s_errors[random.Next(s_errors.Length)],
            1 << random.Next(16), 1 << random.Next(16), random.Next());
    }
}

/// <summary>
/// A channel whose reads and writes are short, and which fails at a position: from then on every call in that direction fails, as on a broken connection or a
/// full disk. Short writes are what a gather write leaves after EINTR or EAGAIN: the rest goes in further pieces.
/// </summary>
internal sealed class FaultChannel(IMigrationChannel inner, ChannelFault fault) : IMigrationChannel
{
    private readonly Random _reads = new(fault.Seed), _writes = new(fault.Seed + 1);
    private long _read, _written;

    public string Name => inner.Name;

    public bool IsBidirectional => inner.IsBidirectional;

    public bool PeerHasClosed => inner.PeerHasClosed;

    /// <summary>True once a call has failed.</summary>
    internal bool HasFailed { get; private set; }

    public int Read(Span<byte> destination)
    {
        long left = fault.ReadFailsAt - _read;
        if (left <= 0)
        {
            HasFailed = true;
            return fault.Errno == Errno.None ? 0 : throw Failure("read from", fault.Errno);
        }
        int most = (int)Math.Min(left, 1 + _reads.Next(fault.ReadMost));
        int n = inner.Read(destination[..Math.Min(destination.Length, most)]);
        _read += n;
        return n;
    }

    public void Write(ReadOnlySpan<byte> source)
    {
        while (source.Length > 0)
        {
            long left = fault.WriteFailsAt - _written;
            if (left <= 0)
            {
                HasFailed = true;
                throw Failure("write to", fault.Errno == Errno.None ? Errno.EPIPE : fault.Errno);
            }
            int piece = (int)Math.Min(Math.Min(left, source.Length), 1 + _writes.Next(fault.WriteMost));
            inner.Write(source[..piece]);
            _written += piece;
            source = source[piece..];
        }
    }

    public void WriteGather(GatherList parts)
    {
        try
        {
            for (int i = 0; i < parts.Count; i++) Write(parts.Segment(i));
        }
        finally
        {
            parts.Clear();
        }
    }

    public void Shutdown(ChannelShutdown how) => inner.Shutdown(how);

    public bool Drain(TimeSpan timeout) => inner.Drain(timeout);

    public void Dispose() => inner.Dispose();

    private ChannelException Failure(string what, Errno errno)
    {
        // A broken connection is broken for the peer too.
        if (inner.IsBidirectional) inner.Shutdown(ChannelShutdown.Both);
        return new ChannelException($"cannot {what} {Name}: {errno}", errno);
    }
}
