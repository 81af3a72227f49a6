using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

internal sealed partial class VfioUserSession
{
    private readonly Queue<(VfioUserHeader Header, byte[] Body, OwnedFd[] Fds)> _deferred = new();
    private long _deferredBytes;

    /// <summary>Gets the next command: one that had to wait, or one from the socket.</summary>
    private bool Next(out VfioUserHeader header, out Span<byte> body)
    {
        if (_deferred.Count == 0) return Receive(out header, out body);
        VfioUserSocket.Close(_fds);
        (header, byte[] bytes, OwnedFd[] fds) = _deferred.Dequeue();
        _fds.AddRange(fds);
        _deferredBytes -= bytes.Length;
        body = bytes;
        return true;
    }

    /// <summary>
    /// Waits for the device. Meanwhile its threads may wait for the client's answers to DMA, which only this thread can read (vfio-user S-32), so it
    /// goes on receiving; commands that come before those answers are kept for later, in order.
    /// </summary>
    private Errno Await(ValueTask<Errno> work)
    {
        if (work.IsCompleted) return work.GetAwaiter().GetResult();
        Task<Errno> task = work.AsTask();
        WaitFor(task, Timeout.InfiniteTimeSpan);
        return task.GetAwaiter().GetResult();
    }

    /// <summary>Time left to answer the present request (vfio-user S-31).</summary>
    private TimeSpan Remaining
    {
        get
        {
            TimeSpan left = _device.Options.QuiesceTimeout - Stopwatch.GetElapsedTime(_requestStart);
            return left > TimeSpan.Zero ? left : TimeSpan.Zero;
        }
    }

    /// <summary>Whether the migration state may be read and changed: not while a late change of an earlier request still runs.</summary>
    private bool IsFsmFree() => _device.LateStep is not { IsCompleted: false } late || WaitFor(late, Remaining);

    /// <summary>
    /// Waits for a change of the migration state, at most as long as the client may have to wait (vfio-user S-31). A change that takes longer goes
    /// on.
    /// </summary>
    private Errno AwaitStep(Func<ValueTask<Errno>> step)
    {
        if (!IsFsmFree()) return Errno.EIO;
        ValueTask<Errno> work = step();
        if (work.IsCompleted) return work.GetAwaiter().GetResult();
        Task<Errno> task = work.AsTask();
        if (WaitFor(task, Remaining)) return task.GetAwaiter().GetResult();
        VfioUserLog.StepTimeout(_logger, _socket.Name, (long)_device.Options.QuiesceTimeout.TotalMilliseconds);
        _device.LateStep = task;
        return Errno.EIO;
    }

    /// <summary>Makes the device stop its DMA (vfio-user 7). False when it did not; the request is then refused with EIO (vfio-user S-34).</summary>
    private bool Quiesce()
    {
        TimeSpan limit = Remaining;
        if (_device.LateQuiesce is { IsCompleted: false } late && !WaitFor(late, limit)) return false;
        ValueTask<Errno> work = _backend.Quiesce();
        if (work.IsCompleted) return work.GetAwaiter().GetResult() == Errno.None;
        Task<Errno> task = work.AsTask();
        if (WaitFor(task, limit)) return task.GetAwaiter().GetResult() == Errno.None;
        VfioUserLog.QuiesceTimeout(_logger, _socket.Name, (long)limit.TotalMilliseconds);
        _device.LateQuiesce = Release(task, _backend);
        return false;
    }

    private static async Task<Errno> Release(Task<Errno> quiesce, IVfioUserBackend backend)
    {
        Errno errno = await quiesce;
        if (errno == Errno.None) backend.Unquiesce();
        return errno;
    }

    private bool WaitFor(Task task, TimeSpan limit)
    {
        if (_dmaRequests is null || _twin is not null) return task.Wait(limit);
        using var timer = new CancellationTokenSource();
        using (timer.Token.Register(Signal, _wake))
        {
            Task woken = task.ContinueWith(static (_, wake) => Signal(wake), _wake, CancellationToken.None,
                TaskContinuationOptions.ExecuteSynchronously, TaskScheduler.Default);
            timer.CancelAfter(limit);
            while (!task.IsCompleted && !timer.IsCancellationRequested)
            {
                if (_dmaRequests.HasPending && _socket.WaitReadable(_wake)) ReceiveMeanwhile();
                else if (!task.IsCompleted && !timer.IsCancellationRequested) Posix.Poll(_wake, Posix.POLLIN, null, -1, out _);
                Posix.DrainEventFd(_wake);
            }
            // The eventfd must not be signalled after it was closed.
            if (task.IsCompleted) woken.Wait();
        }
        return task.IsCompleted;
    }

    private static void Signal(object? wake)
    {
        try
        {
            Posix.SignalEventFd((OwnedFd)wake!);
        }
        catch (ObjectDisposedException)
        {
            // This quiesce did not end before its session did; nothing waits for it any more.
        }
    }

    private void ReceiveMeanwhile()
    {
        try
        {
            var fds = new List<OwnedFd>();
            VfioUserHeader? received = _socket.ReceiveHeader(fds);
            if (received is { } header && header.SizeBytes >= VfioUserHeader.Length && header.SizeBytes <= _maxMessageBytes)
            {
                if (IsDueReply(header))
                {
                    VfioUserSocket.Close(fds);
                    return;
                }
                if (_deferred.Count < VfioUserLimits.DeferredCommands && _deferredBytes + header.SizeBytes <= VfioUserLimits.DeferredBytes)
                {
                    byte[] body = new byte[header.SizeBytes - VfioUserHeader.Length];
                    _deferred.Enqueue((header, body, [.. fds]));
                    _deferredBytes += body.Length;
                    _socket.ReceiveBody(body);
                    return;
                }
            }
            VfioUserSocket.Close(fds);
        }
        catch (ChannelException e)
        {
            VfioUserLog.DeviceFailed(_logger, _socket.Name, VfioUserCommand.DmaRead, VmmException.Describe(e));
        }
        // The client is gone, broke the protocol, or sent too many commands: its DMA gets no answers any more, so the device must not wait.
        _socket.Shutdown();
        _dmaRequests!.End();
    }

    /// <summary>Ends the connection, for whatever reason (vfio-user S-33): stops DMA and drops maps and eventfds; the device keeps its state and runs.</summary>
    private void End()
    {
        _requestStart = Stopwatch.GetTimestamp();
        _socket.Shutdown();
        _dmaRequests?.Dispose();
        _device.Dma.Messages = null;
        foreach ((_, _, OwnedFd[] fds) in _deferred)
            foreach (OwnedFd fd in fds) fd.Dispose();
        _deferred.Clear();
        if (_twin is not null)
        {
            _twin.Shutdown();
            _twinReader?.GetAwaiter().GetResult();
        }
        bool quiet = Quiesce();
        _device.Dma.StopLog();
        _device.Dma.Clear();
        _device.Irqs.Unbind();
        if (_device.LateStep is { } late) WaitFor(late, Timeout.InfiniteTimeSpan);
        Await(_device.Fsm.Recover());
        _backend.ClientLost();
        if (quiet) _backend.Unquiesce();
    }
}
