using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Channels;

/// <summary>
/// A pipe or character device. Closing a descriptor wakes no blocked call, so the descriptors are non-blocking and each wait polls an eventfd too.
/// </summary>
internal sealed class PipeChannel : IMigrationChannel
{
    private readonly OwnedFd? _read;
    private readonly OwnedFd? _write;
    private readonly OwnedFd _wake = Posix.EventFd();
    private volatile bool _shut;

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

    public bool Drain(TimeSpan timeout) => false;

    public void Dispose()
    {
        _read?.Dispose();
        _write?.Dispose();
        _wake.Dispose();
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
