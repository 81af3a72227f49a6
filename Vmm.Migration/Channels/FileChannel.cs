using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Channels;

/// <summary>
/// A file from an offset on. Sequential reads and writes keep their own position and leave the descriptor's alone. No call waits for another process: a FIFO
/// is refused (<see cref="MigrationConnector"/> opens it as a <see cref="PipeChannel"/>).
/// </summary>
internal sealed class FileChannel : ISeekableChannel
{
    private const int OwnerOnly = 0x180; // 0600

    private readonly OwnedFd _fd;
    private readonly string? _path;
    private readonly long _baseOffset;
    private readonly bool _created;
    private Func<OwnedFd, Errno> _sync = Posix.Fsync;
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
    /// <param name="path">An existing file, or a new one, which gets mode 0600.</param>
    /// <param name="offset">Where the stream begins.</param>
    /// <param name="sync">What <see cref="Drain"/> calls instead of fsync(2), or null.</param>
    internal static FileChannel Create(string path, long offset, Func<OwnedFd, Errno>? sync = null)
    {
        bool created = true;
        OwnedFd? fd = Posix.Open(path, Posix.O_RDWR | Posix.O_CREAT | Posix.O_EXCL, OwnerOnly, out Errno errno);
        if (fd is null && errno == Errno.EEXIST)
        {
            created = false;
            fd = Posix.Open(path, Posix.O_WRONLY | Posix.O_NONBLOCK | Posix.O_NOCTTY, 0, out errno);
        }
        if (fd is null) throw new ChannelException($"Could not create '{path}': {Posix.Describe(errno)}", errno);
        RefusePipe(fd, path);
        var channel = new FileChannel(fd, $"file:{path}", path, offset, created) { _sync = sync ?? Posix.Fsync };
        // Devices such as /dev/full cannot be truncated, but can be written.
        errno = Posix.Truncate(fd, offset);
        if (errno is Errno.None or Errno.EINVAL) return channel;
        channel.Dispose();
        throw new ChannelException($"Could not truncate '{path}': {Posix.Describe(errno)}", errno);
    }

    /// <summary>Opens for reading.</summary>
    internal static FileChannel Open(string path, long offset)
    {
        OwnedFd fd = Posix.Open(path, Posix.O_RDONLY | Posix.O_NONBLOCK | Posix.O_NOCTTY, 0, out Errno errno)
            ?? throw new ChannelException($"Could not open '{path}': {Posix.Describe(errno)}", errno);
        RefusePipe(fd, path);
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

    /// <summary>Syncs the file to stable storage, and its directory if this channel has made the file.</summary>
    /// <exception cref="ChannelException">Bytes or the name may be lost.</exception>
    public bool Drain(TimeSpan timeout)
    {
        Errno errno = _sync(_fd);
        // Character devices cannot be synced.
        if (errno is not (Errno.None or Errno.EINVAL)) throw Posix.Error($"cannot sync {Name}", errno);
        if (_created && _path is not null) errno = Posix.SyncDirectory(Path.GetDirectoryName(Path.GetFullPath(_path))!, _sync);
        return errno is Errno.None or Errno.EINVAL ? true : throw Posix.Error($"cannot sync the directory of {Name}", errno);
    }

    /// <summary>Undoes a failed save as far as the file system lets it: removes the file if this save created it, else truncates it.</summary>
    internal void Abandon()
    {
        try
        {
            if (_created && _path is not null) File.Delete(_path);
            else Posix.Truncate(_fd, _baseOffset);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // The save has failed for a reason that matters more, and an incomplete stream does not load.
        }
    }

    public void Dispose() => _fd.Dispose();

    private static void RefusePipe(OwnedFd fd, string path)
    {
        if (Posix.Stat(fd, out FileStatus status) != Errno.None || !status.IsPipe) return;
        fd.Dispose();
        throw new ConfigurationException($"'{path}' is a FIFO; expected a file");
    }

    private void ThrowIfShut()
    {
        if (_shut) throw new ChannelException($"{Name}: the channel was shut down", Errno.ECANCELED);
    }
}
