using Vmm.Core.Interop;
using Vmm.Core.Threading;

namespace Vmm.Core.Devices;

/// <summary>A request of a guest to its machine.</summary>
internal enum GuestRequest
{
    /// <summary>Reset the machine.</summary>
    Reset,
    /// <summary>Switch the machine off.</summary>
    Shutdown,
    /// <summary>A vCPU cannot go on.</summary>
    InternalError,
}

/// <summary>
/// Requests of a guest. Another thread than the vCPU's carries them out, because a vCPU cannot wait for itself to stop. Thread-safe (QEMU:
/// <c>qemu_system_reset_request</c>, <c>qemu_system_shutdown_request</c>).
/// </summary>
/// <param name="loop">Its thread carries out the requests.</param>
internal sealed class GuestRequests(EventFdLoop loop) : IDisposable
{
    private readonly Lock _gate = new();
    private readonly OwnedFd _event = Posix.EventFd();
    private GuestRequest? _pending;
    private int? _exitCode;
    private IDisposable? _registration;

    /// <summary>The exit code that the guest gave when it switched itself off, or null.</summary>
    public int? ExitCode
    {
        get
        {
            lock (_gate) return _exitCode;
        }
    }

    /// <summary>Makes a request. While an earlier request is pending, the new one replaces it only if the earlier one is a reset.</summary>
    /// <param name="request">What the guest asks for.</param>
    /// <param name="exitCode">The guest's exit code, or null.</param>
    public void Post(GuestRequest request, int? exitCode = null)
    {
        lock (_gate)
        {
            if (_pending is null or GuestRequest.Reset) _pending = request;
            if (exitCode is not null) _exitCode = exitCode;
        }
        Posix.SignalEventFd(_event);
    }

    /// <summary>Drops a pending request and carries out no further one.</summary>
    public void Dispose()
    {
        _registration?.Dispose();
        _event.Dispose();
    }

    internal void Attach(Action<GuestRequest> handler) => _registration = loop.Add(_event, () =>
    {
        Posix.DrainEventFd(_event);
        GuestRequest? request;
        lock (_gate) (request, _pending) = (_pending, null);
        if (request is { } r) handler(r);
    });
}
