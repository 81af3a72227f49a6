using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;

namespace Vmm.Tests.Support;

/// <summary>Scripted servers at a path, a new one for each connection; the last one's connection ends before the next is served.</summary>
internal sealed class ScriptedVfioUserListener : IDisposable
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(20);
    private readonly UnixListener _listener;
    private readonly OwnedFd _stop = Posix.EventFd();
    private readonly Func<OwnedFd, int, ScriptedVfioUserServer> _make;
    private readonly List<ScriptedVfioUserServer> _servers = [];
    private readonly Task _accepting;

    /// <param name="path">Where to listen.</param>
    /// <param name="make">Makes the server of a connection, given its number from 0.</param>
    internal ScriptedVfioUserListener(string path, Func<OwnedFd, int, ScriptedVfioUserServer> make)
    {
        _listener = UnixListener.Listen(path, backlog: 4);
        _make = make;
        _accepting = WorkerThread.Run("test/accept", Accept);
    }

    /// <summary>The servers so far, one per connection.</summary>
    internal List<ScriptedVfioUserServer> Servers
    {
        get
        {
            lock (_servers) return [.. _servers];
        }
    }

    private void Accept()
    {
        for (int i = 0; Posix.Poll(_listener.Socket, Posix.POLLIN, _stop, -1, out _) != 0; i++)
        {
            OwnedFd connection = Posix.Accept(_listener.Socket, out Errno errno) ?? throw Posix.Error("accept", errno);
            lock (_servers) _servers.Add(_make(connection, i).Start());
        }
    }

    public void Dispose()
    {
        Posix.SignalEventFd(_stop);
        Assert.That(_accepting.Wait(s_deadline), "the listener did not end");
        _listener.Dispose();
        foreach (ScriptedVfioUserServer one in Servers) one.Dispose();
        _stop.Dispose();
    }
}
