using Microsoft.Extensions.Logging;
using Vmm.Core.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Core.Threading;
using Nito.AsyncEx.Synchronous;

/// <summary>
/// One thread that waits for the eventfds of a VM's devices and calls their handlers. The thread holds no lock during a call; a handler takes the
/// locks that it needs and then checks that its registration still exists. The thread starts with the first registration or with
/// <see cref="Prepare"/>, and ends with this object. Dispose without the BQL, because a handler may wait for it. Thread-safe.
/// </summary>
/// <param name="loggers">Logs handlers that throw.</param>
public sealed class EventFdLoop(ILoggerFactory loggers) : IDisposable
{
    private readonly Lock _gate = new();
    private readonly Dictionary<ulong, (OwnedFd Fd, Action Handler)> _handlers = [];
    private readonly ILogger _logger = loggers.CreateLogger<EventFdLoop>();
    private Epoll? _epoll;
    private OwnedFd? _wake;
    private Task? _thread;
    private ulong _nextKey = 1;
    private bool _disposed;

    /// <summary>Watches an eventfd.</summary>
    /// <param name="fd">Must stay open until the registration is disposed; the handler drains it.</param>
    /// <param name="handler">Called without locks on the loop's thread while the eventfd is readable. A handler that throws is not called again.</param>
    /// <returns>Dispose to stop watching; a call that has begun may still run afterwards.</returns>
    /// <exception cref="ChannelException">The operating system refused.</exception>
    public IDisposable Add(OwnedFd fd, Action handler)
    {
        ArgumentNullException.ThrowIfNull(fd);
        ArgumentNullException.ThrowIfNull(handler);
        lock (_gate)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            Start();
            ulong key = _nextKey++;
            _epoll!.Add(fd, key);
            _handlers.Add(key, (fd, handler));
            return new Registration(() => Remove(key));
        }
    }

    /// <summary>Starts the thread before the first registration, so that a registration during a migration's downtime does not wait for it.</summary>
    public void Prepare()
    {
        lock (_gate)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            Start();
        }
    }

    /// <summary>Ends the thread and waits for it.</summary>
    public void Dispose()
    {
        lock (_gate)
        {
            if (_disposed) return;
            _disposed = true;
            if (_wake is not null) Posix.SignalEventFd(_wake);
        }
        _thread?.WaitAndUnwrapException();
        _epoll?.Dispose();
        _wake?.Dispose();
    }

    private void Start()
    {
        if (_thread is not null) return;
        _wake = Posix.EventFd();
        _epoll = new Epoll();
        _epoll.Add(_wake, 0);
        _thread = WorkerThread.Run("vmm-eventfd", Run);
    }

    private void Remove(ulong key)
    {
        lock (_gate)
        {
            if (_handlers.Remove(key, out var entry) && !_disposed) _epoll!.Remove(entry.Fd);
        }
    }

    private void Run()
    {
        Span<ulong> keys = stackalloc ulong[64];
        while (true)
        {
            int count = _epoll!.Wait(keys);
            foreach (ulong key in keys[..count])
            {
                if (key == 0) return;
                Call(key);
            }
        }
    }

    private void Call(ulong key)
    {
        (OwnedFd Fd, Action Handler) entry;
        lock (_gate)
        {
            if (!_handlers.TryGetValue(key, out entry)) return;
        }
        try
        {
            entry.Handler();
        }
#pragma warning disable CA1031 // One failed handler must not stop the interrupts of other devices; it is logged and not called again.
        catch (Exception e)
#pragma warning restore CA1031
        {
            CoreLog.EventFdHandlerFailed(_logger, e);
            Remove(key);
        }
    }
}
