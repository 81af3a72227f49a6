using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;

namespace Vmm.Migration.Qmp;

/// <summary>A listening UNIX socket with its accept thread (qmp.md section 1). Disposing it ends the thread and removes the file if it is ours.</summary>
internal sealed class QmpListener : IDisposable
{
    private const int Backlog = 16, OPath = 0x200000, AfterFailureMs = 100;

    private readonly Action<OwnedFd> _serve;
    private readonly QmpLog _log;
    private readonly OwnedFd _socket;
    private readonly OwnedFd _wake;
    private readonly FileStatus _made;
    private readonly Task _accepting;

    internal QmpListener(string path, Action<OwnedFd> serve, QmpLog log)
    {
        (Path, _serve, _log) = (path, serve, log);
        byte[] address = Posix.UnixAddress(path);
        ClearPlace(path, address);
        _socket = Posix.Socket(Posix.AF_UNIX);
        try
        {
            Errno errno = Posix.Bind(_socket, address);
            if (errno == Errno.EADDRINUSE) throw new ConfigurationException($"QMP socket '{path}' is in use");
            if (errno != Errno.None) throw Posix.Error($"cannot bind QMP socket '{path}'", errno);
            // Nobody can connect before listen(), so there is no moment with wider permissions that matters.
            errno = Posix.Chmod(path, 0x180 /* 0600 */);
            if (errno == Errno.None) errno = Posix.Listen(_socket, Backlog);
            if (errno != Errno.None) throw Posix.Error($"cannot listen on QMP socket '{path}'", errno);
            _made = Look(path) ?? throw new ConfigurationException($"QMP socket '{path}' vanished");
            Posix.SetNonBlocking(_socket, true);
            _wake = Posix.EventFd();
        }
        catch
        {
            _socket.Dispose();
            throw;
        }
        _accepting = WorkerThread.Run("qmp-accept", AcceptLoop);
    }

    internal string Path { get; private set; }

    /// <summary>A rename keeps the socket; who connects to the old name's place finds what was there before.</summary>
    internal void MoveTo(string path)
    {
        File.Move(Path, path, overwrite: true);
        Path = path;
    }

    public void Dispose()
    {
        Posix.SignalEventFd(_wake);
        _accepting.GetAwaiter().GetResult();
        if (Look(Path) is { } now && now.Device == _made.Device && now.Inode == _made.Inode) File.Delete(Path);
        _socket.Dispose();
        _wake.Dispose();
    }

    private void AcceptLoop()
    {
        while (true)
        {
            Posix.Poll(_socket, Posix.POLLIN, _wake, -1, out bool woken);
            if (woken) return;
            OwnedFd? client = Posix.Accept(_socket, out Errno errno);
            if (client is not null)
            {
                _serve(client);
            }
            else if (errno != Errno.EAGAIN)
            {
                // Out of descriptors, most likely: the connection stays queued, so look again after a moment instead of spinning.
                _log.CannotAccept(Posix.Describe(errno));
                Posix.Poll(_wake, Posix.POLLIN, null, AfterFailureMs, out _);
            }
        }
    }

    private static void ClearPlace(string path, byte[] address)
    {
        if (Look(path) is not { } found) return;
        if (!found.IsSocket) throw new ConfigurationException($"QMP socket '{path}': the path exists and is not a socket");
        using OwnedFd probe = Posix.Socket(Posix.AF_UNIX);
        if (Posix.Connect(probe, address, null, 0) != Errno.ECONNREFUSED) throw new ConfigurationException($"QMP socket '{path}' is in use");
        File.Delete(path);
    }

    /// <summary>What is at a path itself, symbolic links not followed; null if nothing.</summary>
    private static FileStatus? Look(string path)
    {
        using OwnedFd? fd = Posix.Open(path, OPath | Posix.O_NOFOLLOW, 0, out Errno errno);
        if (fd is null && errno != Errno.ENOENT) throw Posix.Error($"cannot use QMP socket path '{path}'", errno);
        return fd is not null && Posix.Stat(fd, out FileStatus stat) == Errno.None ? stat : null;
    }
}
