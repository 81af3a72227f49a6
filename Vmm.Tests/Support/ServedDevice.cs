using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;

namespace Vmm.Tests.Support;

/// <summary>A vfio-user server that serves one client after the other over socketpairs. A fault of the server fails the test on dispose.</summary>
internal sealed class ServedDevice : IDisposable
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);
    private readonly IVfioUserBackend _backend;
    private Task _serving = Task.CompletedTask;

    internal ServedDevice(IVfioUserBackend backend, VfioUserServerOptions? options = null)
    {
        _backend = backend;
        Server = new VfioUserServer(backend, options);
    }

    internal VfioUserServer Server { get; }

    internal VfioUserDevice Device => Server.Device;

    /// <summary>Connects a client. The previous client must have disconnected.</summary>
    internal RawVfioUserClient Connect() => new(ConnectSocket());

    /// <summary>Opens a connection and returns the client's end, which the caller owns.</summary>
    internal OwnedFd ConnectSocket()
    {
        Ended();
        (OwnedFd ours, OwnedFd theirs) = Posix.SocketPair();
        _serving = WorkerThread.Run("test-server", () => Server.Serve(theirs, "pair"));
        return ours;
    }

    /// <summary>Connects a client and negotiates the version.</summary>
    internal RawVfioUserClient Attach(string? json = RawVfioUserClient.Json)
    {
        RawVfioUserClient client = Connect();
        client.Negotiate(json);
        return client;
    }

    /// <summary>Waits for the end of the current session.</summary>
    internal void Ended() => Assert.That(_serving.Wait(s_deadline), "the session did not end in time");

    public void Dispose()
    {
        Server.Stop();
        Ended();
        Server.Dispose();
        _backend.Dispose();
    }
}
