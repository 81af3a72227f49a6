using System.Diagnostics;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Ram;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// Paces an outgoing migration in windows of 100 ms (QEMU: <c>migration_rate_limit</c>, BUFFER_DELAY), measures the bandwidth of the connection, and computes
/// how many bytes fit into the downtime. One thread.
/// </summary>
internal sealed class SendWindow(QemuFileWriter f, OutgoingProgress progress, CancellationToken cancel)
{
    private static readonly TimeSpan s_length = TimeSpan.FromMilliseconds(100);

    /// <summary>The bandwidth to assume while there was nothing to send and so nothing to measure: QEMU's default for max-bandwidth.</summary>
    private const double AssumedBandwidthBytesPerSecond = 128 << 20;

    private long _start = Stopwatch.GetTimestamp();
    private long _startBytes = f.FlushedBytes;
    private double _busyBandwidth;
    private bool _wasIdle;

    /// <summary>Bytes that the downtime limit allows to be sent after the stop (QEMU: <c>threshold_size</c>).</summary>
    internal long ThresholdBytes { get; private set; }

    /// <summary>Rate while the VM runs, bytes/s; 0 until the first window is over.</summary>
    internal double BytesPerSecond { get; private set; }

    /// <summary>Rate expected after the stop, bytes/s; 0 until the first window is over.</summary>
    internal double SwitchoverBytesPerSecond { get; private set; }

    /// <summary>Notes that there was nothing to send for a moment, so that this window does not count as a measurement.</summary>
    internal void NoteIdle() => _wasIdle = true;

    /// <summary>The stream offset at which this window's share of max-bandwidth is used up.</summary>
    internal long BudgetPosition(MigrationParameters parameters)
    {
        ulong limit = parameters.MaxBandwidthBytesPerSecond;
        if (limit == 0) return long.MaxValue;
        long left = _startBytes + (long)Math.Min(limit / 10, long.MaxValue / 2) - f.FlushedBytes;
        return f.Position + Math.Max(left, 1);
    }

    /// <summary>Waits for the end of the window if its budget is used up; begins the next window if this one is over.</summary>
    internal void Pace(MigrationParameters parameters, RamFigures ram)
    {
        TimeSpan spent = Stopwatch.GetElapsedTime(_start);
        ulong limit = parameters.MaxBandwidthBytesPerSecond;
        if (spent < s_length && limit != 0 && (ulong)(f.FlushedBytes - _startBytes) >= limit / 10)
        {
            // Rounded up: after a wait that ends a fraction of a millisecond early, each call would let one more page through until the window is over.
            cancel.WaitHandle.WaitOne((int)Math.Ceiling((s_length - spent).TotalMilliseconds));
            spent = Stopwatch.GetElapsedTime(_start);
        }
        if (spent < s_length) return;
        double bandwidth = (f.FlushedBytes - _startBytes) / spent.TotalSeconds;
        if (!_wasIdle) _busyBandwidth = bandwidth;
        double expected = _wasIdle ? Math.Max(bandwidth, _busyBandwidth > 0 ? _busyBandwidth : AssumedBandwidthBytesPerSecond) : bandwidth;
        _wasIdle = false;
        double forSwitchover = parameters.AvailSwitchoverBandwidthBytesPerSecond > 0 ? parameters.AvailSwitchoverBandwidthBytesPerSecond : expected;
        ThresholdBytes = (long)Math.Min(forSwitchover * parameters.DowntimeLimitMs / 1000, long.MaxValue / 2);
        (BytesPerSecond, SwitchoverBytesPerSecond) = (expected, forSwitchover);
        progress.OnWindow(bandwidth, ram, forSwitchover);
        (_start, _startBytes) = (Stopwatch.GetTimestamp(), f.FlushedBytes);
    }

    /// <summary>
    /// Lowers the threshold to the bandwidth between two drains, which is what the destination really took: bytes that only fill buffers make the window's own
    /// figure too high.
    /// </summary>
    internal void OnDelivered(MigrationParameters parameters, double bytesPerSecond)
    {
        BytesPerSecond = Math.Min(BytesPerSecond, bytesPerSecond);
        if (parameters.AvailSwitchoverBandwidthBytesPerSecond != 0) return;
        ThresholdBytes = Math.Min(ThresholdBytes, (long)(bytesPerSecond * parameters.DowntimeLimitMs / 1000));
        SwitchoverBytesPerSecond = Math.Min(SwitchoverBytesPerSecond, bytesPerSecond);
    }
}
