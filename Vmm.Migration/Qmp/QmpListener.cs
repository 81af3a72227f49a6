using Nito.AsyncEx.Synchronous;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;

namespace Vmm.Migration.Qmp;

/// <summary>A listening UNIX socket with its accept thread (qmp 1). Disposing it ends the thread and removes the socket file that it made.</summary>
internal sealed class QmpListener : IDisposable
{
    private const int Backlog = 16, AfterFailureMs = 100;

    private readonly Action<OwnedFd> _serve;
    private readonly QmpLog _log;
    private readonly UnixListener _listener;
    private readonly OwnedFd _wake;
    private readonly Task _accepting;

    internal QmpListener(string path, Action<OwnedFd> serve, QmpLog log)
    {
        (_serve, _log) = (serve, log);
        _listener = UnixListener.ListenAnywhere(path, Backlog);
        try
        {
            Posix.SetNonBlocking(_listener.Socket, true);
            _wake = Posix.EventFd();
        }
        catch
        {
            _listener.Dispose();
            throw;
        }
        _accepting = WorkerThread.Run("qmp-accept", AcceptLoop);
    }

    internal string Path => _listener.Path;

    /// <summary>Renames the socket file. The socket stays the same, so connected and connecting clients are not disturbed.</summary>
    internal void MoveTo(string path) => _listener.MoveTo(path);

    public void Dispose()
    {
        Posix.SignalEventFd(_wake);
        _accepting.WaitAndUnwrapException();
        _listener.Dispose();
        _wake.Dispose();
    }

    private void Serve(OwnedFd client)
    {
        try
        {
            _serve(client);
        }
        catch (ChannelException e)
        {
            _log.CannotAccept(e.Message);
        }
    }

    private void AcceptLoop()
    {
        while (true)
        {
            Posix.Poll(_listener.Socket, Posix.POLLIN, _wake, -1, out bool woken);
            if (woken) return;
            OwnedFd? client = Posix.Accept(_listener.Socket, out Errno errno);
            if (client is not null)
            {
                Serve(client);
            }
            else if (errno != Errno.EAGAIN)
            {
                // Probably this process has no descriptor left. The connection stays queued, so wait a moment instead of spinning.
                _log.CannotAccept(Posix.Describe(errno));
                Posix.Poll(_wake, Posix.POLLIN, null, AfterFailureMs, out _);
            }
        }
    }
}
