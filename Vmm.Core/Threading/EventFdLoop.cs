using Microsoft.Extensions.Logging;
using Vmm.Core.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Core.Threading;

/// <summary>
/// One thread that waits for the eventfds of a VM's devices and calls their handlers. It holds no lock while it calls; a handler takes what it
/// needs and then asks whether its registration is still wanted. The thread starts with the first registration, or before, and ends with this object,
/// which must be disposed without the BQL. Thread-safe.
/// </summary>
/// <param name="loggers">For handlers that fail.</param>
public sealed class EventFdLoop(ILoggerFactory loggers) : IDisposable
{
    private const int EPOLL_CTL_ADD = 1, EPOLL_CTL_DEL = 2, EPOLLIN = 1;

    private readonly Lock _gate = new();
    private readonly Dictionary<ulong, (OwnedFd Fd, Action Handler)> _handlers = [];
    private readonly ILogger _logger = loggers.CreateLogger<EventFdLoop>();
    private OwnedFd? _epoll, _wake;
    private Task? _thread;
    private ulong _nextKey = 1;
    private bool _disposed;

    /// <summary>Watches an eventfd.</summary>
    /// <param name="fd">Must stay open until the registration is disposed; the handler drains it.</param>
    /// <param name="handler">Called on the loop's thread, no lock held, as long as the eventfd is readable. One that throws is called no more.</param>
    /// <returns>Dispose to stop watching. A call that has begun may still be running afterwards.</returns>
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
            Control(EPOLL_CTL_ADD, fd, key);
            _handlers.Add(key, (fd, handler));
            return new Registration(() => Remove(key));
        }
    }

    /// <summary>Starts the thread ahead of the first registration, for who has no time to wait for that later.</summary>
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
        _thread?.GetAwaiter().GetResult();
        _epoll?.Dispose();
        _wake?.Dispose();
    }

    private void Start()
    {
        if (_thread is not null) return;
        _wake = Posix.EventFd();
        _epoll = LibC.epoll_create1(Posix.O_CLOEXEC);
        if (_epoll.IsInvalid) throw Posix.Error("epoll_create1", Posix.LastError);
        Control(EPOLL_CTL_ADD, _wake, 0);
        _thread = WorkerThread.Run("vmm-eventfd", Run);
    }

    private void Control(int operation, OwnedFd fd, ulong key)
    {
        var e = new LibC.EpollEvent { Events = EPOLLIN, Data = key };
        if (LibC.epoll_ctl(_epoll!, operation, fd, ref e) != 0) throw Posix.Error("epoll_ctl", Posix.LastError);
    }

    private void Remove(ulong key)
    {
        lock (_gate)
        {
            if (_handlers.Remove(key, out var entry) && !_disposed) Control(EPOLL_CTL_DEL, entry.Fd, key);
        }
    }

    private void Run()
    {
        var events = new LibC.EpollEvent[64];
        while (true)
        {
            int n = LibC.epoll_wait(_epoll!, ref events[0], events.Length, -1);
            if (n < 0)
            {
                Errno errno = Posix.LastError;
                if (errno == Errno.EINTR) continue;
                throw Posix.Error("epoll_wait", errno);
            }
            for (int i = 0; i < n; i++)
            {
                if (events[i].Data == 0) return;
                Call(events[i].Data);
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
#pragma warning disable CA1031 // The other devices' interrupts must go on; the failed one is reported and no longer called.
        catch (Exception e)
#pragma warning restore CA1031
        {
            CoreLog.EventFdHandlerFailed(_logger, e);
            Remove(key);
        }
    }
}
