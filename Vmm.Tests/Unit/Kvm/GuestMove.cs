using System.Globalization;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Guests;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>One move of memcheck: what the guest saw and what the VMM did.</summary>
/// <param name="GuestMs">The gap that the guest measured by its TSC.</param>
/// <param name="ClockMs">The gap that the guest measured by its kvm-clock.</param>
/// <param name="DowntimeMs">Time from the last vCPU's exit at the source to the first vCPU's entry at the destination, as the VMM reports it.</param>
/// <param name="ReportedMs">The source's <c>downtime</c>: from the stop request to the destination's confirmation.</param>
/// <param name="Delay">How long the vCPU's threads waited for a processor, as the kernel reports it.</param>
internal sealed record GuestMove(double GuestMs, double ClockMs, double DowntimeMs, double ReportedMs, VcpuDelay.Found Delay)
{
    internal double ToleranceMs => 2 + 0.05 * DowntimeMs;

    /// <summary>Guest and VMM agree without an allowance for the host's delays.</summary>
    internal bool IsStrict => Math.Abs(GuestMs - DowntimeMs) <= ToleranceMs;

    /// <summary>The gap exceeds the downtime by no more than the vCPU's threads waited for a processor inside the gap, which is no downtime.</summary>
    internal bool IsExplained => IsStrict || GuestMs <= DowntimeMs + ToleranceMs + Delay.InGapMs;

    /// <summary>The gap exceeds the sum of the downtime and the whole time that the vCPU's threads waited for a processor during the move.</summary>
    internal bool IsUnexplained => GuestMs > DowntimeMs + ToleranceMs + Delay.InMoveMs;

    public override string ToString() => string.Create(CultureInfo.InvariantCulture,
        $"guest {GuestMs:f2} ms (kvm-clock {ClockMs:f2}), downtime {DowntimeMs:f2} ms, apart {GuestMs - DowntimeMs:f2} of {ToleranceMs:f2} ms, vCPU kept waiting {Delay.InGapMs:f2} ms in the gap, {Delay.InMoveMs:f2} ms in the move; reported {ReportedMs:f2} ms");
}

/// <summary>The moves of one guest, and how the host delayed a thread that is no vCPU meanwhile.</summary>
internal sealed class GuestMoves
{
    private static readonly TimeSpan s_watch = TimeSpan.FromSeconds(1);

    private readonly List<GuestMove> _moves = [];
    private readonly BareThread _bare = new(TimeSpan.FromMilliseconds(2));

    internal IReadOnlyList<GuestMove> All => _moves;

    private int Strict => _moves.Count(static m => m.IsStrict);

    /// <summary>Says whether another move is wanted. A burst of the host's own work can hit most of a few moves in a row; three times as many tell it from a fault.</summary>
    /// <param name="count">How many there should be.</param>
    internal bool WantsMore(int count) =>
        _moves.Count < count || (_moves.Count < 3 * count && _moves.Count - Strict > BareThread.Most(_moves.Count, _bare.Share));

    internal void Add(GuestMove move)
    {
        TestContext.Progress.WriteLine($"move {_moves.Count + 1}: {move}");
        _moves.Add(move);
        _bare.Watch(s_watch);
    }

    /// <summary>
    /// No gap is shorter than the downtime, and the guest's two clocks agree. A gap is longer than the downtime no more often than the host delays a bare
    /// thread at either end. A gap that the vCPU's own wait does not explain is no more frequent than a bare thread's pause that the scheduler does not count.
    /// </summary>
    internal void Check()
    {
        int count = _moves.Count, strict = Strict, unexplained = _moves.Count(static m => m.IsUnexplained);
        int most = BareThread.Most(count, _bare.Share), mostUnexplained = BareThread.Most(count, _bare.UnknownShare);
        TestContext.Progress.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{count} moves: {strict} agree without allowance ({100.0 * strict / count:f0} %), {_moves.Count(static m => m.IsExplained)} with the vCPU's own wait in the gap, {count - unexplained} with that in the move; downtime up to {_moves.Max(static m => m.DowntimeMs):f1} ms; {_bare}, so at most {most} and {mostUnexplained} may disagree"));
        Assert.Multiple(() =>
        {
            foreach (GuestMove move in _moves)
            {
                Assert.That(move.GuestMs, Is.GreaterThanOrEqualTo(move.DowntimeMs - move.ToleranceMs), $"{move}");
                Assert.That(move.ClockMs, Is.EqualTo(move.GuestMs).Within(move.ToleranceMs), $"the guest's two clocks: {move}");
            }
            Assert.That(count - strict, Is.LessThanOrEqualTo(most), "disagreements without allowance");
            Assert.That(unexplained, Is.LessThanOrEqualTo(mostUnexplained), "disagreements that the vCPU's own wait does not explain");
        });
    }
}

/// <summary>
/// Measures how long the vCPU's threads waited for a processor between the guest's last look at the source and its first look at the destination.
/// The kernel counts the wait in each thread's schedstat and, for the guest, as stolen time. The guest records its stolen time with each look, so the
/// two counts can be combined.
/// </summary>
internal sealed class VcpuDelay
{
    private ulong _baseNs; // The guest's stolen time when the wait of its present thread was zero.

    /// <summary>How long a thread has been runnable without running so far: the second field of its schedstat.</summary>
    internal static ulong WaitNs(int pid, int threadId) => WaitNs($"/proc/{pid}/task/{threadId}/schedstat");

    internal static ulong WaitNs(string schedstat) => ulong.Parse(File.ReadAllText(schedstat).Split(' ')[1], CultureInfo.InvariantCulture);

    /// <summary>Finds the first vCPU's thread of another process. During a rehearsal a second thread has this name, so this waits until it has ended.</summary>
    internal static int ThreadOf(int pid)
    {
        List<(int Id, string Name)> found = [];
        KvmGuest.WaitFor(() => (found = LeakCheck.ThreadNames(pid).FindAll(static t => t.Name == "kvm-vcpu-0")).Count == 1, "one thread of the first vCPU");
        return found[0].Id;
    }

    /// <summary>How long the threads of one vCPU were runnable without running.</summary>
    /// <param name="InGapMs">The wait between the guest's last look at the source and its first look at the destination.</param>
    /// <param name="InMoveMs">The wait from the beginning of the move to the guest's first look at the destination.</param>
    internal readonly record struct Found(double InGapMs, double InMoveMs)
    {
        internal Found And(TimeSpan both) => new(InGapMs + both.TotalMilliseconds, InMoveMs + both.TotalMilliseconds);
    }

    /// <summary>Computes the waits of a move that has completed.</summary>
    /// <param name="found">What the guest found at the destination.</param>
    /// <param name="sourceNs">The wait of the source's thread, before the move and after the thread was parked.</param>
    /// <param name="stolenNs">The guest's stolen time in the memory of the source.</param>
    /// <param name="destinationNs">The wait of the destination's thread before the move.</param>
    internal Found OnMove(MemCheckGuest.Found found, (ulong Before, ulong After) sourceNs, ulong stolenNs, ulong destinationNs)
    {
        double leaving = (double)sourceNs.After - (found.StolenBeforeNs - _baseNs), entering = Math.Max(0, (double)(found.StolenAfterNs - stolenNs) - destinationNs);
        _baseNs = stolenNs;
        return new Found((Math.Max(0, leaving) + entering) / 1e6, (sourceNs.After - sourceNs.Before + entering) / 1e6);
    }

    /// <summary>Corrects the base after a snapshot replaced the guest's memory, and the stolen time in it, while the vCPU was stopped.</summary>
    internal void OnLoad(ulong stolenBeforeNs, ulong stolenAfterNs) => _baseNs += stolenAfterNs - stolenBeforeNs;
}
