using System.Diagnostics;
using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Channels;

/// <summary>
/// A pipe, FIFO or character device. Closing a descriptor wakes no blocked call, so the descriptors are non-blocking and each wait polls an eventfd too.
/// </summary>
internal sealed class PipeChannel : IMigrationChannel
{
    private const int MaxPollMs = 20;

    private readonly OwnedFd? _read;
    private readonly OwnedFd? _write;
    private readonly OwnedFd _wake = Posix.EventFd();
    private volatile bool _shut;
    private bool _hasBegun;

    internal PipeChannel(OwnedFd? read, OwnedFd? write, string name)
    {
        _read = read;
        _write = write;
        Name = name;
        if (read is not null) Posix.SetNonBlocking(read, true);
        if (write is not null) Posix.SetNonBlocking(write, true);
    }

    public string Name { get; }

    public bool IsBidirectional => false;

    public bool PeerHasClosed => false;

    public int Read(Span<byte> destination)
    {
        if (_read is null) throw new ChannelException($"{Name} cannot be read", Errno.EBADF);
        while (true)
        {
            if (_shut) throw Shut();
            if (!_hasBegun)
            {
                // A FIFO that nobody has opened for writing yet reads as ended, but it does not poll as ended.
                Posix.Poll(_read, Posix.POLLIN, _wake, -1, out _);
                _hasBegun = true;
                continue;
            }
            int n = Posix.Read(_read, destination, out Errno errno);
            if (n >= 0) return n;
            if (errno != Errno.EAGAIN) throw Posix.Error($"cannot read from {Name}", errno);
            Posix.Poll(_read, Posix.POLLIN, _wake, -1, out _);
        }
    }

    public void Write(ReadOnlySpan<byte> source)
    {
        while (source.Length > 0)
        {
            int n = Posix.Write(Writable(), source, out Errno errno);
            if (n < 0) WaitWritable(errno);
            else source = source[n..];
        }
    }

    public void WriteGather(GatherList parts)
    {
        try
        {
            while (parts.PendingBytes > 0)
                if (parts.WriteOnce(Writable(), -1, out Errno errno) < 0) WaitWritable(errno);
        }
        finally
        {
            parts.Clear();
        }
    }

    public void Shutdown(ChannelShutdown how)
    {
        if (how == ChannelShutdown.Both)
        {
            _shut = true;
            if (!_wake.IsClosed) Posix.SignalEventFd(_wake);
        }
        else if (how == ChannelShutdown.Write)
        {
            _write?.Dispose();
        }
    }

    /// <summary>
    /// Waits until the reader has taken every byte, because a byte in the pipe is lost when the reader ends. A pipe cannot say what the reader does with
    /// them.
    /// </summary>
    /// <returns>False at once if this is no pipe.</returns>
    /// <exception cref="ChannelException">The reader has ended, time is over or the channel was shut, and bytes were left. They cannot be read any more.</exception>
    public bool Drain(TimeSpan timeout)
    {
        if (_write is null) return true;
        if (Posix.Stat(_write, out FileStatus status) != Errno.None || !status.IsPipe) return false;
        long start = Stopwatch.GetTimestamp();
        // No event tells that a pipe is empty, so poll.
        for (int waitMs = 1; ; waitMs = Math.Min(2 * waitMs, MaxPollMs))
        {
            int unread = Posix.UnreadBytes(_write);
            if (unread <= 0) return true;
            bool isLate = Stopwatch.GetElapsedTime(start) > timeout;
            bool isGone = !isLate && (Posix.Poll(_write, 0, _wake, waitMs, out _) & Posix.POLLERR) != 0;
            if ((!isGone && !isLate && !_shut) || TakeBack() == 0) continue;
            if (_shut) throw Shut();
            throw isLate
                ? new ChannelException($"{Name}: {unread} bytes were not read within {timeout.TotalSeconds:0} s", Errno.ETIMEDOUT)
                : new ChannelException($"{Name}: the reader ended and left {unread} bytes unread", Errno.EPIPE);
        }
    }

    public void Dispose()
    {
        _read?.Dispose();
        _write?.Dispose();
        _wake.Dispose();
    }

    /// <summary>Reads what is still in the pipe, so that a reader that comes back late gets an incomplete stream and not a second copy of the VM.</summary>
    /// <returns>Number of bytes; 0 if the reader has taken all of them meanwhile.</returns>
    private int TakeBack()
    {
        using OwnedFd? end = Posix.Open($"/proc/self/fd/{_write!.Number}", Posix.O_RDONLY | Posix.O_NONBLOCK, 0, out Errno errno);
        if (end is null) throw Posix.Error($"{Name}: cannot look at what was not read", errno);
        byte[] waste = new byte[64 << 10];
        int total = 0;
        for (int n; (n = Posix.Read(end, waste, out _)) > 0;) total += n;
        return total;
    }

    private OwnedFd Writable()
    {
        if (_shut) throw Shut();
        return _write ?? throw new ChannelException($"{Name} cannot be written", Errno.EBADF);
    }

    private void WaitWritable(Errno errno)
    {
        if (errno != Errno.EAGAIN) throw Posix.Error($"cannot write to {Name}", errno);
        Posix.Poll(_write!, Posix.POLLOUT, _wake, -1, out _);
    }

    private ChannelException Shut() => new($"{Name}: the channel was shut down", Errno.ECANCELED);
}
