using System.Diagnostics;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;
using Vmm.Migration.Diagnostics;
using Vmm.Migration.Parameters;
using Vmm.Migration.Status;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// The second phase: sends dirty pages and device data while the VM runs, until the rest fits into the downtime and no longer shrinks
/// (<see cref="SwitchoverDecision"/>; stream 12; QEMU: <c>migration_iteration_run</c>). One thread.
/// </summary>
internal sealed class PrecopyLoop
{
    /// <summary>With fewer bytes sent since the last drain, a drain would gain nothing.</summary>
    private const long DrainFromBytes = 1 << 20;

    /// <summary>How long to wait when nothing can be sent and the VM cannot be stopped yet.</summary>
    private const int IdleWaitMs = 5;

    /// <summary>With auto-converge the dirty log is asked at least that often, from the second pass on (QEMU: CPU_THROTTLE_DIRTY_SYNC_TIMESLICE_MS).</summary>
    private static readonly TimeSpan s_throttleSync = TimeSpan.FromSeconds(5);

    private static readonly TimeSpan s_drainTimeout = TimeSpan.FromSeconds(1);

    private readonly OutgoingAttempt _attempt;
    private readonly OutgoingLink _link;
    private readonly SwitchoverAcks _acks;
    private readonly SendWindow _window;
    private readonly SwitchoverDecision _decision;
    private readonly DowntimeRamp _ramp = new();
    private readonly ThrottleDecision? _throttle;
    private readonly long _startedAt = Stopwatch.GetTimestamp();
    private long _drainedAt = Stopwatch.GetTimestamp();
    private long _drainedBytes;
    private long _syncedAt = Stopwatch.GetTimestamp();
    private bool _hasSettled;

    internal PrecopyLoop(OutgoingAttempt attempt, OutgoingLink link, SwitchoverAcks acks)
    {
        (_attempt, _link, _acks) = (attempt, link, acks);
        _window = new SendWindow(link.File, attempt.Progress, attempt.Cancel);
        _decision = new SwitchoverDecision(link.Stream.EstimatePending().PrecopyBytes);
        _drainedBytes = link.File.FlushedBytes;
        if (attempt.Plan.Context.Capabilities.IsOn(MigrationCapability.AutoConverge)) _throttle = new ThrottleDecision();
    }

    private MigrationParameters Parameters => _ramp.Apply(_attempt.Vm.Parameters.Current);

    /// <summary>A VM that does not run dirties nothing, and its downtime is nobody's.</summary>
    private bool HasFloor => Parameters.HasDowntimeFloor && _attempt.Vm.Vm.RunState.IsRunning;

    private SwitchoverWait WaitForSize => _window.ThresholdBytes == 0 ? SwitchoverWait.Bandwidth : _ramp.IsStalled ? SwitchoverWait.Stalled : SwitchoverWait.Size;

    private double ElapsedMs => Stopwatch.GetElapsedTime(_startedAt).TotalMilliseconds;

    internal void Run()
    {
        QemuFileWriter f = _link.File;
        while (!IsReadyToStop())
        {
            var budget = new IterateBudget(_window.BudgetPosition(Parameters), Slice(), _attempt.Cancel);
            _link.Stream.SaveLiveIterate(budget);
            f.Flush();
            _window.Pace(Parameters, _link.Ram);
        }
    }

    private TimeSpan Slice()
    {
        TimeSpan longest = _attempt.Vm.IterateLimit;
        if (_decision.Last != SwitchoverChoice.WorthMore) return longest;
        var slice = TimeSpan.FromMilliseconds(SwitchoverDecision.SliceMs(ElapsedMs));
        return slice < longest ? slice : longest;
    }

    private bool IsReadyToStop()
    {
        _attempt.Latch.ThrowIfSet();
        PendingBytes pending = _link.Stream.EstimatePending();
        _attempt.Progress.PendingBytes = pending.TotalBytes;
        _acks.Take();
        if (IsForced(pending)) return true;
        bool isPassOver = pending.PrecopyBytes == 0;
        if (pending.TotalBytes > _window.ThresholdBytes && !isPassOver)
        {
            _attempt.Progress.WaitsFor = WaitForSize;
            // A throttle that is set at the end of passes only would come late with long ones.
            if (_throttle is not null && _link.Ram.SyncCount > 1 && Stopwatch.GetElapsedTime(_syncedAt) >= s_throttleSync) Synchronise(ref pending);
            return false;
        }
        // Bytes that are still in buffers would add to the downtime, so they are drained before the VM stops. In the middle of a pass more of them follow.
        bool isDrained = isPassOver || !HasFloor;
        if (isDrained) Drain();
        SwitchoverChoice choice = Synchronise(ref pending);
        if (choice == SwitchoverChoice.Stop && !isDrained)
        {
            Drain();
            choice = Synchronise(ref pending) == SwitchoverChoice.TooLarge ? SwitchoverChoice.TooLarge : SwitchoverChoice.Stop;
        }
        if (choice == SwitchoverChoice.Stop && IsSettled(isPassOver) && MayStop(ref pending)) return true;
        if (choice == SwitchoverChoice.TooLarge) _ramp.OnPass(ElapsedMs, pending.TotalBytes);
        if (pending.PrecopyBytes == 0)
        {
            // The rest can only go after the stop. It is too large for the downtime, or an acknowledgement is missing.
            _window.NoteIdle();
            _link.Heartbeat.SendIfDue();
            if (choice != SwitchoverChoice.Stop || !_acks.AreThere) _attempt.Cancel.WaitHandle.WaitOne(IdleWaitMs);
        }
        return false;
    }

    /// <summary>Synchronises with the dirty log and asks what to do.</summary>
    private SwitchoverChoice Synchronise(ref PendingBytes pending)
    {
        long before = _link.Stream.EstimatePending().PrecopyBytes, ramBefore = _link.Ram.RemainingBytes;
        _syncedAt = Stopwatch.GetTimestamp();
        pending = _link.Stream.ExactPending();
        double syncMs = Stopwatch.GetElapsedTime(_syncedAt).TotalMilliseconds;
        Throttle(_link.Ram.RemainingBytes - ramBefore);
        _attempt.Progress.PendingBytes = pending.TotalBytes;
        MigrationLog.Pending(_attempt.Vm.Logger, pending.TotalBytes, _window.ThresholdBytes);
        _attempt.Progress.OnPass(_link.Ram.SyncCount);
        _acks.Take();
        SwitchoverChoice choice = _decision.Next(
            new SwitchoverSample(before, pending, _window.ThresholdBytes, _window.BytesPerSecond, _window.SwitchoverBytesPerSecond, ElapsedMs, Parameters.DowntimeLimitMs), HasFloor);
        _attempt.Progress.OnDecision(pending.TotalBytes, _window.SwitchoverBytesPerSecond, syncMs, choice switch
        {
            SwitchoverChoice.WorthMore => SwitchoverWait.Shrinking,
            SwitchoverChoice.Stop when _acks.AreThere => SwitchoverWait.Nothing,
            SwitchoverChoice.Stop => SwitchoverWait.Acknowledgement,
            _ => WaitForSize,
        });
        return choice;
    }

    /// <summary>
    /// A drain covers the main channel. Pages in the channels of multifd are in front of their next SYNC, which the destination takes before it answers the next
    /// drain; so one more slice, which begins with that SYNC, empties them too.
    /// </summary>
    private bool IsSettled(bool isPassOver)
    {
        bool isNeeded = _link.Sender is not null && HasFloor && isPassOver && !_hasSettled && _decision.SentBytes >= DrainFromBytes;
        _hasSettled |= isNeeded;
        return !isNeeded;
    }

    /// <summary>Ends the loop when <c>x-precopy-deadline</c> has passed.</summary>
    /// <returns>False while it has not, true if the VM must stop now.</returns>
    /// <exception cref="OperationCanceledException">The migration must be cancelled.</exception>
    private bool IsForced(in PendingBytes pending)
    {
        MigrationParameters limits = _attempt.Vm.Parameters.Current;
        if (limits.PrecopyDeadlineMs == 0 || _attempt.Progress.ElapsedMs < limits.PrecopyDeadlineMs) return false;
        bool isForced = limits.PrecopyDeadlineAction == MigrationParameterTable.ForceAction;
        MigrationLog.Deadline(_attempt.Vm.Logger, limits.PrecopyDeadlineMs, isForced ? "its guest is stopped" : "it is cancelled", pending.TotalBytes);
        if (!isForced) throw new OperationCanceledException("the migration did not converge within x-precopy-deadline");
        // A guest is never stopped for a destination that has not answered yet.
        _link.WaitAnswered();
        Drain();
        return true;
    }

    private void Throttle(long dirtiedBytes)
    {
        if (_throttle is not { } throttle) return;
        int before = throttle.Percent, percent = throttle.Next(ElapsedMs, Math.Max(dirtiedBytes, 0), _link.File.Position, Parameters);
        if (percent == before) return;
        MigrationLog.Throttled(_attempt.Vm.Logger, percent);
        _attempt.Vm.Vm.CpuThrottle.Set(percent);
    }

    private bool MayStop(ref PendingBytes pending)
    {
        if (!_acks.AreThere) return false;
        if (_link.ReturnPath is not { HasAnswered: false }) return true;
        // A guest is never stopped for a destination that has not answered yet: it may be busy with another migration.
        _attempt.Progress.WaitsFor = SwitchoverWait.Answer;
        _link.WaitAnswered();
        return Synchronise(ref pending) == SwitchoverChoice.Stop;
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
