using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;

namespace Vmm.Tests.Support;

/// <summary>A vfio-user server over socketpairs, one client after the other. A fault of the server fails the test on dispose.</summary>
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

    /// <summary>Connects; the client before must be gone.</summary>
    internal RawVfioUserClient Connect() => new(ConnectSocket());

    /// <summary>The client's end of a connection; the caller's.</summary>
    internal OwnedFd ConnectSocket()
    {
        Ended();
        (OwnedFd ours, OwnedFd theirs) = Posix.SocketPair();
        _serving = WorkerThread.Run("test-server", () => Server.Serve(theirs, "pair"));
        return ours;
    }

    /// <summary>Connects and agrees on a version.</summary>
    internal RawVfioUserClient Attach(string? json = RawVfioUserClient.Json)
    {
        RawVfioUserClient client = Connect();
        client.Negotiate(json);
        return client;
    }

    /// <summary>Waits for the end of the present session.</summary>
    internal void Ended() => Assert.That(_serving.Wait(s_deadline), "the session does not end");

    public void Dispose()
    {
        Server.Stop();
        Ended();
        Server.Dispose();
        _backend.Dispose();
    }
}
