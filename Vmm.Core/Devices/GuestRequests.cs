using Vmm.Core.Interop;
using Vmm.Core.Threading;

namespace Vmm.Core.Devices;

/// <summary>What a guest can ask of its machine.</summary>
public enum GuestRequest
{
    /// <summary>Start again.</summary>
    Reset,
    /// <summary>Switch off.</summary>
    Shutdown,
    /// <summary>A vCPU cannot go on.</summary>
    InternalError,
}

/// <summary>
/// Requests of a guest, done on another thread than the vCPU's that makes them: a vCPU cannot wait for itself. Thread-safe (QEMU:
/// <c>qemu_system_reset_request</c>, <c>qemu_system_shutdown_request</c>).
/// </summary>
/// <param name="loop">Where they are done.</param>
public sealed class GuestRequests(EventFdLoop loop) : IDisposable
{
    private readonly Lock _gate = new();
    private readonly OwnedFd _event = Posix.EventFd();
    private GuestRequest? _pending;
    private int? _exitCode;
    private IDisposable? _registration;

    /// <summary>What the guest said when it switched itself off, or null.</summary>
    public int? ExitCode
    {
        get
        {
            lock (_gate) return _exitCode;
        }
    }

    /// <summary>Makes a request; a later one before it is done wins over a reset only.</summary>
    /// <param name="request">The request.</param>
    /// <param name="exitCode">What the guest says with it, or null.</param>
    public void Post(GuestRequest request, int? exitCode = null)
    {
        lock (_gate)
        {
            if (_pending is null or GuestRequest.Reset) _pending = request;
            if (exitCode is not null) _exitCode = exitCode;
        }
        Posix.SignalEventFd(_event);
    }

    /// <summary>Ends the watching; what is pending is dropped.</summary>
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
