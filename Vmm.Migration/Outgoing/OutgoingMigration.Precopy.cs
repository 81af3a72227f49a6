using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;
using Vmm.Migration.Diagnostics;
using Vmm.Migration.State;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Outgoing;

/// <summary>The iterations and the switchover (spec 12; QEMU: <c>migration_iteration_run</c>, <c>migration_completion</c>).</summary>
internal sealed partial class OutgoingMigration
{
    /// <summary>QEMU: BUFFER_DELAY.</summary>
    private static readonly TimeSpan s_window = TimeSpan.FromMilliseconds(100);

    /// <summary>Below this nothing worth draining is under way.</summary>
    private const long DrainFromBytes = 1 << 20;

    /// <summary>Taken for a wire that has not been measured because there was nothing to send: QEMU's default max-bandwidth.</summary>
    private const double AssumedBandwidthBytesPerSecond = 128 << 20;

    private double _busyBandwidth;

    private static readonly TimeSpan s_drainTimeout = TimeSpan.FromSeconds(1);

    /// <summary>For a destination that has been asked not to confirm; one on this host has no way to go.</summary>
    private static readonly TimeSpan s_lastWord = TimeSpan.FromSeconds(5), s_lastWordHere = TimeSpan.FromMilliseconds(500);

    private long _windowStart;
    private long _windowStartBytes;
    private long _thresholdBytes;
    private long _drainedAt;
    private long _drainedBytes;
    private uint _ping = 1;
    private int _ackRequests;
    private bool _windowWasIdle;

    /// <summary>How long to wait when nothing can be sent and the VM cannot be stopped yet.</summary>
    private const int IdleWaitMs = 5;

    private TimeSpan LastWord => _cpr is null ? s_lastWord : s_lastWordHere;

    /// <summary>The destination has acknowledged every first part it must have (spec vfio-migration 3.6).</summary>
    private bool IsSwitchoverAcknowledged => !_switchoverAck || _reader!.SwitchoverAcks >= _ackRequests || !_context.Vm.RunState.IsRunning;

    private void Precopy(QemuFileWriter f, SaveDispatcher dispatcher)
    {
        _phase = "iterate";
        _context.Rehearsal.Wait();
        _windowStart = Stopwatch.GetTimestamp();
        _windowStartBytes = f.FlushedBytes;
        (_drainedAt, _drainedBytes) = (_windowStart, _windowStartBytes);
        while (true)
        {
            _latch.ThrowIfSet();
            PendingBytes pending = dispatcher.Estimate();
            TakeAckRequests(dispatcher);
            if (pending.TotalBytes <= _thresholdBytes || pending.PrecopyBytes == 0)
            {
                // What is still in buffers would count as downtime, so it goes out before the VM is asked to stop.
                Drain(f, dispatcher);
                pending = dispatcher.Exact();
                Progress.PendingBytes = pending.TotalBytes;
                MigrationLog.Pending(_context.Logger, pending.TotalBytes, _thresholdBytes);
                Progress.OnPass(_context.Ram.SyncCount);
                TakeAckRequests(dispatcher);
                if (pending.TotalBytes <= _thresholdBytes && IsSwitchoverAcknowledged) return;
                if (pending.PrecopyBytes == 0)
                {
                    // All that is left can only go after the stop, and is too much for the downtime or not yet acknowledged.
                    _windowWasIdle = true;
                    _cancel.Token.WaitHandle.WaitOne(IdleWaitMs);
                }
            }
            Progress.PendingBytes = pending.TotalBytes;
            dispatcher.Iterate(new IterateBudget(BudgetPosition(f), _context.IterateLimit, _cancel.Token));
            f.Flush();
            Pace(f);
        }
    }

    private void TakeAckRequests(SaveDispatcher dispatcher)
    {
        if (_switchoverAck && !_context.Compat.LegacySwitchoverAck) _ackRequests += dispatcher.TakeSwitchoverAckRequests();
    }

    /// <summary>Stream offset at which this window's share of max-bandwidth is used up.</summary>
    private long BudgetPosition(QemuFileWriter f)
    {
        ulong limit = _context.Parameters.Current.MaxBandwidthBytesPerSecond;
        if (limit == 0) return long.MaxValue;
        long left = _windowStartBytes + (long)Math.Min(limit / 10, long.MaxValue / 2) - f.FlushedBytes;
        return f.Position + Math.Max(left, 1);
    }

    /// <summary>Ends the window when it is over; waits for its end when its budget is used up.</summary>
    private void Pace(QemuFileWriter f)
    {
        MigrationParameters parameters = _context.Parameters.Current;
        TimeSpan spent = Stopwatch.GetElapsedTime(_windowStart);
        ulong limit = parameters.MaxBandwidthBytesPerSecond;
        if (spent < s_window && limit != 0 && (ulong)(f.FlushedBytes - _windowStartBytes) >= limit / 10)
        {
            // Rounded up: a wait that ends a fraction of a millisecond early would let a page a turn slip through until the window is over.
            _cancel.Token.WaitHandle.WaitOne((int)Math.Ceiling((s_window - spent).TotalMilliseconds));
            spent = Stopwatch.GetElapsedTime(_windowStart);
        }
        if (spent < s_window) return;
        double bandwidth = (f.FlushedBytes - _windowStartBytes) / spent.TotalSeconds;
        // A window in which there was nothing to send says nothing about what the wire takes.
        if (!_windowWasIdle) _busyBandwidth = bandwidth;
        double expected = _windowWasIdle ? Math.Max(bandwidth, _busyBandwidth > 0 ? _busyBandwidth : AssumedBandwidthBytesPerSecond) : bandwidth;
        _windowWasIdle = false;
        double forSwitchover = parameters.AvailSwitchoverBandwidthBytesPerSecond > 0 ? parameters.AvailSwitchoverBandwidthBytesPerSecond : expected;
        _thresholdBytes = (long)Math.Min(forSwitchover * parameters.DowntimeLimitMs / 1000, long.MaxValue / 2);
        Progress.OnWindow(bandwidth, _context.Ram, forSwitchover);
        _windowStart = Stopwatch.GetTimestamp();
        _windowStartBytes = f.FlushedBytes;
    }

    private void Drain(QemuFileWriter f, SaveDispatcher dispatcher)
    {
        if (f.Position < DrainFromBytes) return;
        long start = Stopwatch.GetTimestamp();
        if (_reader is not null)
        {
            // A PONG comes from behind everything sent so far: the destination has loaded it.
            WritePing(dispatcher, ++_ping);
            f.Flush();
            _reader.WaitPong(_ping, s_drainTimeout);
        }
        else
        {
            f.Flush();
            if (_channel is SocketChannel) _channel.Drain(s_drainTimeout);
        }
        _latch.ThrowIfSet();
        Progress.DrainMs = Stopwatch.GetElapsedTime(start).TotalMilliseconds;
        // What was measured at our end filled buffers too; from drain to drain the figure is what the destination really took.
        MigrationParameters parameters = _context.Parameters.Current;
        double delivered = (f.FlushedBytes - _drainedBytes) / Stopwatch.GetElapsedTime(_drainedAt).TotalSeconds;
        if (parameters.AvailSwitchoverBandwidthBytesPerSecond == 0 && f.FlushedBytes - _drainedBytes >= DrainFromBytes)
            _thresholdBytes = Math.Min(_thresholdBytes, (long)(delivered * parameters.DowntimeLimitMs / 1000));
        (_drainedAt, _drainedBytes) = (Stopwatch.GetTimestamp(), f.FlushedBytes);
    }

    private void Switchover(QemuFileWriter f, SaveDispatcher dispatcher)
    {
        _phase = "stop";
        long stopAt, guestAtNs;
        double stopMs, ramMs, stateMs;
        var bql = _context.Vm.Bql.Acquire();
        try
        {
            RunStateNotifier runState = _context.Vm.RunState;
            _stateBefore = runState.State;
            _context.GlobalState.Store(_stateBefore, runState.WasSuspended);
            stopAt = Stopwatch.GetTimestamp();
            Progress.OnStop(f.Position);
            _stopped = true;
            runState.Stop(RunState.FinishMigrate);
            stopMs = Ms(stopAt);
            if (_mode == MigrationMode.CprTransfer) LeaveProcess();
            guestAtNs = RunStateTable.IsRunning(_stateBefore) ? _context.Vm.Accelerator?.RunTimes.LeftAtNs ?? 0 : 0;
            if (_switchoverAck && !_context.Compat.LegacySwitchoverAck && dispatcher.TakeSwitchoverAckRequests() > 0)
                throw new DeviceStateException("a device produced new first data after the switchover was decided; the destination cannot acknowledge it any more");
            if (_context.Capabilities.IsOn(MigrationCapability.PauseBeforeSwitchover)
                && _context.Machine.TryMove(MigrationStatus.Active, MigrationStatus.PreSwitchover))
            {
                bql.Dispose();
                _continue.Wait();
                bql = _context.Vm.Bql.Acquire();
                _latch.ThrowIfSet();
                if (!_context.Machine.TryMove(MigrationStatus.PreSwitchover, MigrationStatus.Device)) _latch.ThrowIfSet();
            }
            else if (!_context.Machine.TryMove(MigrationStatus.Active, MigrationStatus.Device))
            {
                _latch.ThrowIfSet();
            }
            _phase = "complete";
            long at = Stopwatch.GetTimestamp();
            if (_context.Compat.SendSwitchoverStart || dispatcher.UsesThreads) dispatcher.WriteCommand(MigCommand.SwitchoverStart);
            dispatcher.CompleteIterables();
            // After the END sections: with them the last registers have been read.
            if (_sender is { } sender) dispatcher.StartThreads(sender, _latch, _cancel.Token);
            ramMs = Ms(at);
            _phase = "device-state";
            at = Stopwatch.GetTimestamp();
            dispatcher.WriteDeviceState();
            lock (_endGate)
            {
                _latch.ThrowIfSet();
                // With the end of the stream the destination may confirm: from here its answer decides.
                _everythingSent = _returnPath;
            }
            dispatcher.WriteEnd();
            stateMs = Ms(at);
            _downtime = new DowntimeReport
            {
                DrainMs = Progress.DrainMs, DeviceStopMs = stopMs, FinalRamMs = ramMs, DeviceStateMs = stateMs,
                TotalMs = Ms(stopAt), AtNs = MonotonicClock.ToNs(stopAt), GuestAtNs = guestAtNs,
            };
            f.Flush();
            dispatcher.JoinThreads();
            _latch.ThrowIfSet();
            _sender?.Finish();
        }
        finally
        {
            bql.Dispose();
        }
        long sendAt = Stopwatch.GetTimestamp();
        f.Flush();
        double sendMs = Ms(sendAt);
        long confirmAt = Stopwatch.GetTimestamp();
        _phase = "confirm";
        Confirm();
        _downtime = _downtime with { SendMs = sendMs, LoadMs = Ms(confirmAt), TotalMs = Ms(stopAt) };
    }

    /// <summary>The guest may have set up interrupts since the new process was given its descriptors: there they would be dead. BQL: held.</summary>
    private void LeaveProcess()
    {
        if (_context.Vm.CprFds.Changes != _handedOver)
            throw new DeviceStateException("descriptors of the VM changed after the new process was given them, as when a guest sets its interrupts up; try again");
        _context.Vm.CprFds.IsLeaving = true;
    }

    /// <summary>
    /// Decides whether the destination has the VM. With a return path its SHUT does. Without one a socket tells at least whether the peer
    /// took every byte and ended in good order; a file for another process must be on disk, a command must have succeeded.
    /// </summary>
    private void Confirm()
    {
        if (_reader is not null)
        {
            while (true)
            {
                ReturnPathEnd end = _reader.WaitEnd(_lateCancel ? LastWord : TimeSpan.FromMilliseconds(200));
                if (end == ReturnPathEnd.Confirmed) return;
                if (_lateCancel) throw new OperationCanceledException("the migration was cancelled");
                if (end == ReturnPathEnd.Failed) throw _reader.Failure!;
                _latch.ThrowIfSet();
            }
        }
        switch (_channel)
        {
            case SocketChannel socket:
                if (socket.WaitPeerEnd(TimeSpan.FromSeconds(1)) == PeerEnd.Reset)
                    throw new ChannelException($"{socket.Name}: the destination ended before it had read everything", Errno.ECONNRESET);
                break;
            case ExecChannel exec:
                if (!exec.Drain(TimeSpan.FromSeconds(30))) throw new ChannelException($"{exec.Name}: the command did not end within 30 s", Errno.ETIMEDOUT);
                break;
            case FileChannel when _mode == MigrationMode.CprExec:
                break; // This process reads it back; a host that lost power would have lost RAM with it.
            default:
                _channel!.Drain(TimeSpan.FromSeconds(30));
                break;
        }
        _latch.ThrowIfSet();
    }

    private static double Ms(long since) => Stopwatch.GetElapsedTime(since).TotalMilliseconds;
}
