using System.Diagnostics;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;
using Vmm.Migration.Diagnostics;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// The second phase: sends dirty pages and device data while the VM runs, until the rest fits into the downtime (stream 12; QEMU:
/// <c>migration_iteration_run</c>). One thread.
/// </summary>
internal sealed class PrecopyLoop
{
    /// <summary>With fewer bytes sent since the last drain, a drain would gain nothing.</summary>
    private const long DrainFromBytes = 1 << 20;

    /// <summary>How long to wait when nothing can be sent and the VM cannot be stopped yet.</summary>
    private const int IdleWaitMs = 5;

    private static readonly TimeSpan s_drainTimeout = TimeSpan.FromSeconds(1);

    private readonly OutgoingAttempt _attempt;
    private readonly OutgoingLink _link;
    private readonly SwitchoverAcks _acks;
    private readonly SendWindow _window;
    private long _drainedAt = Stopwatch.GetTimestamp();
    private long _drainedBytes;

    internal PrecopyLoop(OutgoingAttempt attempt, OutgoingLink link, SwitchoverAcks acks)
    {
        (_attempt, _link, _acks) = (attempt, link, acks);
        _window = new SendWindow(link.File, attempt.Progress, attempt.Cancel);
        _drainedBytes = link.File.FlushedBytes;
    }

    private MigrationParameters Parameters => _attempt.Vm.Parameters.Current;

    internal void Run()
    {
        QemuFileWriter f = _link.File;
        while (!IsReadyToStop())
        {
            var budget = new IterateBudget(_window.BudgetPosition(Parameters), _attempt.Vm.IterateLimit, _attempt.Cancel);
            _link.Stream.SaveLiveIterate(budget);
            f.Flush();
            _window.Pace(Parameters, _link.Ram);
        }
    }

    private bool IsReadyToStop()
    {
        _attempt.Latch.ThrowIfSet();
        PendingBytes pending = _link.Stream.EstimatePending();
        _acks.Take();
        if (pending.TotalBytes <= _window.ThresholdBytes || pending.PrecopyBytes == 0)
        {
            // Bytes that are still in buffers would add to the downtime, so they are drained before the VM stops.
            Drain();
            pending = _link.Stream.ExactPending();
            _attempt.Progress.PendingBytes = pending.TotalBytes;
            MigrationLog.Pending(_attempt.Vm.Logger, pending.TotalBytes, _window.ThresholdBytes);
            _attempt.Progress.OnPass(_link.Ram.SyncCount);
            _acks.Take();
            if (pending.TotalBytes <= _window.ThresholdBytes && _acks.AreThere)
            {
                if (_link.ReturnPath is not { HasAnswered: false }) return true;
                // A guest is never stopped for a destination that has not answered yet: it may be busy with another migration.
                _link.WaitAnswered();
                pending = _link.Stream.ExactPending();
                if (pending.TotalBytes <= _window.ThresholdBytes) return true;
            }
            if (pending.PrecopyBytes == 0)
            {
                // The rest can only go after the stop. It is too large for the downtime, or an acknowledgement is missing.
                _window.NoteIdle();
                _link.Heartbeat.SendIfDue();
                _attempt.Cancel.WaitHandle.WaitOne(IdleWaitMs);
            }
        }
        _attempt.Progress.PendingBytes = pending.TotalBytes;
        return false;
    }

    private void Drain()
    {
        QemuFileWriter f = _link.File;
        if (f.Position < DrainFromBytes) return;
        long start = Stopwatch.GetTimestamp();
        if (_link.ReturnPath is { } returnPath)
        {
            // The destination answers with PONG when it has loaded everything before the PING.
            returnPath.WaitPong(_link.Heartbeat.Send(), s_drainTimeout);
        }
        else
        {
            f.Flush();
            if (_link.Channel is SocketChannel) _link.Channel.Drain(s_drainTimeout);
        }
        _attempt.Latch.ThrowIfSet();
        _attempt.Progress.DrainMs = Stopwatch.GetElapsedTime(start).TotalMilliseconds;
        long delivered = f.FlushedBytes - _drainedBytes;
        if (delivered >= DrainFromBytes) _window.OnDelivered(Parameters, delivered / Stopwatch.GetElapsedTime(_drainedAt).TotalSeconds);
        (_drainedAt, _drainedBytes) = (Stopwatch.GetTimestamp(), f.FlushedBytes);
    }
}
