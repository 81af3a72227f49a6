using Vmm.Core.SaveVm;

namespace Vmm.Migration.Outgoing;

/// <summary>What to do after a synchronisation with the dirty log.</summary>
internal enum SwitchoverChoice
{
    /// <summary>What is left does not fit into the downtime limit: go on, as QEMU does.</summary>
    TooLarge,
    /// <summary>It fits, and another slice makes the downtime shorter at little cost.</summary>
    WorthMore,
    /// <summary>It fits, and nothing is gained by going on.</summary>
    Stop,
}

/// <summary>What is known after one synchronisation.</summary>
/// <param name="BeforeBytes">Left just before it, of what can be sent while the VM runs.</param>
/// <param name="After">Left after it.</param>
/// <param name="ThresholdBytes">Bytes that the downtime limit allows.</param>
/// <param name="BytesPerSecond">Rate while the VM runs.</param>
/// <param name="SwitchoverBytesPerSecond">Rate expected after the stop.</param>
/// <param name="ElapsedMs">Since the first page.</param>
/// <param name="DowntimeLimitMs">The limit in force.</param>
internal readonly record struct SwitchoverSample(
    long BeforeBytes, PendingBytes After, long ThresholdBytes, double BytesPerSecond, double SwitchoverBytesPerSecond, double ElapsedMs, double DowntimeLimitMs);

/// <summary>
/// Decides when to stop the VM. QEMU's rule stops as soon as the rest fits into the downtime limit, so the pause is the limit. Here that only begins the last
/// phase: what is left of the pass must be sent anyway, so it is sent while the VM runs, in short slices. After each of them the dirty log says what the guest
/// has added. The VM stops when that is more than a fifth of what was sent, or when the rest takes a millisecond; so every slice shrinks the rest, and a guest
/// that dirties too fast costs one slice. Without a clock and without state of its VM, so that a table can test it.
/// </summary>
/// <param name="initialBytes">What there is to send at the beginning.</param>
internal sealed class SwitchoverDecision(long initialBytes)
{
    /// <summary>A slice is worth its time while it sends at least this many times what the guest dirties meanwhile.</summary>
    private const int WorthFactor = 5;

    /// <summary>Less is not worth a drain and a synchronisation.</summary>
    private const double NegligibleMs = 1;

    /// <summary>The last phase takes at most this many times the downtime limit, whatever the figures say.</summary>
    private const int LongestInLimits = 2;

    private const double SlicePart = 0.02, ShortestSliceMs = 5, LongestSliceMs = 50;

    private long _lastBytes = initialBytes;
    private double _fitsSinceMs = -1;

    /// <summary>What was decided last. Slices are short only after <see cref="SwitchoverChoice.WorthMore"/>.</summary>
    internal SwitchoverChoice Last { get; private set; }

    /// <summary>Bytes sent between the last two synchronisations.</summary>
    internal long SentBytes { get; private set; }

    /// <summary>Bytes that the guest dirtied between the last two synchronisations and that were not waiting already.</summary>
    internal long DirtiedBytes { get; private set; }

    /// <summary>Length of the next slice of the last phase, ms: a fiftieth of the time so far, so that a slice in vain makes the whole at most 2 % longer.</summary>
    internal static double SliceMs(double elapsedMs) => Math.Clamp(elapsedMs * SlicePart, ShortestSliceMs, LongestSliceMs);

    /// <summary>Takes the figures of a synchronisation.</summary>
    /// <param name="now">The figures.</param>
    /// <param name="hasFloor">False for QEMU's rule.</param>
    internal SwitchoverChoice Next(in SwitchoverSample now, bool hasFloor) => Last = Decide(now, hasFloor);

    private SwitchoverChoice Decide(in SwitchoverSample now, bool hasFloor)
    {
        long left = now.After.PrecopyBytes + now.After.PostcopyBytes;
        (SentBytes, DirtiedBytes) = (_lastBytes - now.BeforeBytes, Math.Max(left - now.BeforeBytes, 0));
        _lastBytes = left;
        if (now.After.TotalBytes > now.ThresholdBytes) return SwitchoverChoice.TooLarge;
        if (_fitsSinceMs < 0) _fitsSinceMs = now.ElapsedMs;
        return hasFloor && IsWorthMore(now, left) ? SwitchoverChoice.WorthMore : SwitchoverChoice.Stop;
    }

    private bool IsWorthMore(in SwitchoverSample now, long left)
    {
        if (left <= now.SwitchoverBytesPerSecond * NegligibleMs / 1000) return false;
        if (now.ElapsedMs - _fitsSinceMs > LongestInLimits * now.DowntimeLimitMs) return false;
        if (SentBytes <= 0 || DirtiedBytes > SentBytes / WorthFactor) return false;
        // With avail-switchover-bandwidth the rest may go much faster after the stop; then the time lost must not exceed the downtime saved.
        double savedSeconds = (SentBytes - DirtiedBytes) / now.SwitchoverBytesPerSecond;
        return savedSeconds >= SentBytes / now.BytesPerSecond - savedSeconds;
    }
}
