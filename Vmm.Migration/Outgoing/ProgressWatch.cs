using System.Diagnostics;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Migration.Attempts;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// Ends an outgoing migration whose destination takes nothing or answers nothing for too long (STREAM.md, deadlines). It looks ten times a second, until
/// everything has been sent; from then on <see cref="Confirmation"/> has a deadline of its own.
/// </summary>
internal sealed class ProgressWatch : IDisposable
{
    private static readonly TimeSpan s_interval = TimeSpan.FromMilliseconds(100);

    private readonly OutgoingAttempt _attempt;
    private readonly OutgoingLink _link;
    private readonly long _startedAt = Stopwatch.GetTimestamp();
    private readonly Timer _timer;
    private readonly Lock _gate = new();
    private long _taken = -1;
    private long _takenAt = Stopwatch.GetTimestamp(), _arrivedAt = Stopwatch.GetTimestamp();

    internal ProgressWatch(OutgoingAttempt attempt, OutgoingLink link)
    {
        (_attempt, _link) = (attempt, link);
        _timer = new Timer(_ => Look(), null, s_interval, s_interval);
    }

    /// <summary>True from the stop of the guest on.</summary>
    internal bool IsStopped { get; set; }

    /// <summary>Ends the watch and waits for a look that is going on.</summary>
    public void Dispose() => _timer.DisposeAsync().AsTask().GetAwaiter().GetResult();

    private void Look()
    {
        if (!_gate.TryEnter()) return;
        try
        {
            if (_attempt.Latch.IsSet || _attempt.HandOver.Stage != SourceStage.Sending) return;
            MigrationParameters limits = _attempt.Vm.Parameters.Current;
            (long taken, bool isWaiting) = Taken();
            if (taken != _taken || !isWaiting) (_taken, _takenAt) = (taken, Stopwatch.GetTimestamp());
            TimeSpan stalled = Stopwatch.GetElapsedTime(_takenAt), limit = TimeSpan.FromMilliseconds(IsStopped ? limits.SwitchoverTimeoutMs : limits.ProgressTimeoutMs);
            if (stalled > limit) End($"the destination has taken nothing for {limit.TotalSeconds:0.#} s", IsStopped ? "x-switchover-timeout" : "x-progress-timeout");
            else if (_link.ReturnPath is { HasAnswered: false } && Stopwatch.GetElapsedTime(_startedAt) is var waited && waited.TotalMilliseconds > limits.SetupTimeoutMs)
                End($"the destination took the connection and has not answered for {limits.SetupTimeoutMs / 1000.0:0.#} s; it may be busy with another migration", "x-setup-timeout");
            // A PONG comes only after everything before the PING has been read, which may take long; so the clock begins when all of it has arrived.
            else if (!isWaiting && _link.Heartbeat.Unanswered.TotalMilliseconds > limits.ProgressTimeoutMs && Stopwatch.GetElapsedTime(_arrivedAt).TotalMilliseconds > limits.ProgressTimeoutMs)
                End($"the destination has answered nothing for {limits.ProgressTimeoutMs / 1000.0:0.#} s", "x-progress-timeout");
            if (isWaiting) _arrivedAt = Stopwatch.GetTimestamp();
        }
        finally
        {
            _gate.Exit();
        }
    }

    private (long TakenBytes, bool IsWaiting) Taken()
    {
        (long taken, bool isWaiting) = _link.Channel is SocketChannel main ? main.Taken : (_link.File.FlushedBytes, _link.File.IsWriting);
        foreach (IMigrationChannel channel in _link.Sender?.Channels ?? [])
        {
            if (channel is not SocketChannel data) continue;
            (long more, bool waits) = data.Taken;
            (taken, isWaiting) = (taken + more, isWaiting || waits);
        }
        return (taken, isWaiting);
    }

    private void End(string what, string parameter) =>
        _attempt.Latch.Set(new ChannelException($"{_link.Channel.Name}: {what}", Errno.ETIMEDOUT) { Hint = $"parameter {parameter} sets this deadline" });
}
