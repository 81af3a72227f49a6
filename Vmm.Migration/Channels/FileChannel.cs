using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Channels;

/// <summary>A file from an offset on. Sequential reads and writes keep their own position and leave the descriptor's alone.</summary>
internal sealed class FileChannel : ISeekableChannel
{
    private readonly OwnedFd _fd;
    private readonly string? _path;
    private readonly long _baseOffset;
    private readonly bool _created;
    private volatile bool _shut;

    private FileChannel(OwnedFd fd, string name, string? path, long baseOffset, bool created)
    {
        _fd = fd;
        Name = name;
        _path = path;
        _created = created;
        _baseOffset = Position = baseOffset;
    }

    public string Name { get; }

    public bool IsBidirectional => false;

    public bool PeerHasClosed => false;

    public long Position { get; set; }

    public long LengthBytes => Posix.Stat(_fd, out FileStatus stat) == Errno.None ? stat.SizeBytes : 0;

    /// <summary>Opens for writing and truncates the file at the offset (QEMU: <c>file_start_outgoing_migration</c>).</summary>
    internal static FileChannel Create(string path, long offset)
    {
        bool created = true;
        OwnedFd? fd = Posix.Open(path, Posix.O_RDWR | Posix.O_CREAT | Posix.O_EXCL, 0x180, out Errno errno);
        if (fd is null && errno == Errno.EEXIST)
        {
            created = false;
            fd = Posix.Open(path, Posix.O_WRONLY, 0, out errno);
        }
        if (fd is null) throw new ChannelException($"Could not create '{path}': {Posix.Describe(errno)}", errno);
        var channel = new FileChannel(fd, $"file:{path}", path, offset, created);
        // Devices such as /dev/full cannot be truncated, but can be written.
        errno = Posix.Truncate(fd, offset);
        if (errno is Errno.None or Errno.EINVAL) return channel;
        channel.Dispose();
        throw new ChannelException($"Could not truncate '{path}': {Posix.Describe(errno)}", errno);
    }

    /// <summary>Opens for reading.</summary>
    internal static FileChannel Open(string path, long offset)
    {
        OwnedFd fd = Posix.Open(path, Posix.O_RDONLY, 0, out Errno errno) ?? throw new ChannelException($"Could not open '{path}': {Posix.Describe(errno)}", errno);
        return new FileChannel(fd, $"file:{path}", path, offset, created: false);
    }

    /// <summary>Wraps an open descriptor, e.g. one of a descriptor set.</summary>
    internal static FileChannel Wrap(OwnedFd fd, string name, long offset, bool cut)
    {
        var channel = new FileChannel(fd, name, null, offset, created: false);
        Errno errno = cut ? Posix.Truncate(fd, offset) : Errno.None;
        if (errno is Errno.None or Errno.EINVAL) return channel;
        channel.Dispose();
        throw new ChannelException($"Could not truncate '{name}': {Posix.Describe(errno)}", errno);
    }

    public int Read(Span<byte> destination)
    {
        ThrowIfShut();
        int n = Posix.PRead(_fd, destination, Position, out Errno errno);
        if (n < 0) throw Posix.Error($"cannot read {Name} at offset {Position}", errno);
        Position += n;
        return n;
    }

    public void Write(ReadOnlySpan<byte> source)
    {
        WriteAt(source, Position);
        Position += source.Length;
    }

    public void WriteGather(GatherList parts)
    {
        try
        {
            while (parts.PendingBytes > 0)
            {
                ThrowIfShut();
                long n = parts.WriteOnce(_fd, Position, out Errno errno);
                if (n < 0) throw Posix.Error($"cannot write {Name} at offset {Position}", errno);
                Position += n;
            }
        }
        finally
        {
            parts.Clear();
        }
    }

    public void ReadAt(Span<byte> destination, long offset)
    {
        while (destination.Length > 0)
        {
            ThrowIfShut();
            int n = Posix.PRead(_fd, destination, offset, out Errno errno);
            if (n < 0) throw Posix.Error($"cannot read {Name} at offset {offset}", errno);
            if (n == 0) throw new StreamTruncatedException($"{Name} ends at offset {offset}, expected {destination.Length} more bytes") { Offset = offset };
            destination = destination[n..];
            offset += n;
        }
    }

    public void WriteAt(ReadOnlySpan<byte> source, long offset)
    {
        while (source.Length > 0)
        {
            ThrowIfShut();
            int n = Posix.PWrite(_fd, source, offset, out Errno errno);
            if (n < 0) throw Posix.Error($"cannot write {Name} at offset {offset}", errno);
            source = source[n..];
            offset += n;
        }
    }

    public void Shutdown(ChannelShutdown how)
    {
        if (how == ChannelShutdown.Both) _shut = true;
    }

    /// <summary>Syncs the file to stable storage.</summary>
    public bool Drain(TimeSpan timeout)
    {
        Errno errno = Posix.Fsync(_fd);
        // Character devices and pipes cannot be synced.
        return errno is Errno.None or Errno.EINVAL ? true : throw Posix.Error($"cannot sync {Name}", errno);
    }

    /// <summary>Undoes a failed save: removes the file if this save created it, else truncates it.</summary>
    internal void Abandon()
    {
        if (_created && _path is not null) File.Delete(_path);
        else Posix.Truncate(_fd, _baseOffset);
    }

    public void Dispose() => _fd.Dispose();

    private void ThrowIfShut()
    {
        if (_shut) throw new ChannelException($"{Name}: the channel was shut down", Errno.ECANCELED);
    }
}
