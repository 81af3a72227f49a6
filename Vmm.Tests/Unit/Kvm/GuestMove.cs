using System.Globalization;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Guests;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>One move of memcheck: what the guest saw and what the VMM did.</summary>
/// <param name="GuestMs">The gap by the guest's TSC.</param>
/// <param name="ClockMs">The gap by its kvm-clock.</param>
/// <param name="DowntimeMs">From the last vCPU leaving the guest at the source until the first one entered it at the destination, as the VMM says.</param>
/// <param name="ReportedMs">The source's <c>downtime</c>: from the request to stop until the confirmation.</param>
/// <param name="Delay">For how long the vCPU's threads stood in line for a processor, as the kernel says.</param>
internal sealed record GuestMove(double GuestMs, double ClockMs, double DowntimeMs, double ReportedMs, VcpuDelay.Found Delay)
{
    internal double ToleranceMs => 2 + 0.05 * DowntimeMs;

    /// <summary>Guest and VMM agree with no allowance for the host.</summary>
    internal bool IsStrict => Math.Abs(GuestMs - DowntimeMs) <= ToleranceMs;

    /// <summary>The difference is what the vCPU's threads waited inside the gap, which is no downtime.</summary>
    internal bool IsExplained => IsStrict || GuestMs <= DowntimeMs + ToleranceMs + Delay.InGapMs;

    /// <summary>The guest's gap is longer than the downtime and all that the vCPU's threads waited during the move.</summary>
    internal bool IsUnexplained => GuestMs > DowntimeMs + ToleranceMs + Delay.InMoveMs;

    public override string ToString() => string.Create(CultureInfo.InvariantCulture,
        $"guest {GuestMs:f2} ms (kvm-clock {ClockMs:f2}), downtime {DowntimeMs:f2} ms, apart {GuestMs - DowntimeMs:f2} of {ToleranceMs:f2} ms, vCPU kept waiting {Delay.InGapMs:f2} ms in the gap, {Delay.InMoveMs:f2} ms in the move; reported {ReportedMs:f2} ms");
}

/// <summary>The moves of one guest, and what the host did meanwhile to a thread that is no vCPU.</summary>
internal sealed class GuestMoves
{
    private static readonly TimeSpan s_watch = TimeSpan.FromSeconds(1);

    private readonly List<GuestMove> _moves = [];
    private readonly BareThread _bare = new(TimeSpan.FromMilliseconds(2));

    internal IReadOnlyList<GuestMove> All => _moves;

    internal void Add(GuestMove move)
    {
        TestContext.Progress.WriteLine($"move {_moves.Count + 1}: {move}");
        _moves.Add(move);
        _bare.Watch(s_watch);
    }

    /// <summary>
    /// The law: no gap is shorter than the downtime, the guest's two clocks agree, and a gap is longer no more often than a thread that is no vCPU is
    /// kept from running at either end; longer than the vCPU's threads waited, no more often than such a thread stands still unknown to its scheduler.
    /// </summary>
    internal void Check()
    {
        int count = _moves.Count, strict = _moves.Count(static m => m.IsStrict), unexplained = _moves.Count(static m => m.IsUnexplained);
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
/// How long the vCPU's threads stood in line for a processor between the guest's last look at the source and its first at the destination. The kernel
/// says so in each thread's schedstat, and to the guest as stolen time; the guest notes the latter with each look, which is how the figures meet.
/// </summary>
internal sealed class VcpuDelay
{
    private ulong _baseNs; // The guest's count when its present thread had none.

    /// <summary>How long a thread was ready and not let run so far: second field of its schedstat.</summary>
    internal static ulong WaitNs(int pid, int threadId) => WaitNs($"/proc/{pid}/task/{threadId}/schedstat");

    internal static ulong WaitNs(string schedstat) => ulong.Parse(File.ReadAllText(schedstat).Split(' ')[1], CultureInfo.InvariantCulture);

    /// <summary>The first vCPU's thread of another process. While that rehearses a move it has another of the name, which ends by itself.</summary>
    internal static int ThreadOf(int pid)
    {
        List<(int Id, string Name)> found = [];
        KvmGuest.WaitFor(() => (found = LeakCheck.ThreadNames(pid).FindAll(static t => t.Name == "kvm-vcpu-0")).Count == 1, "one thread of the first vCPU");
        return found[0].Id;
    }

    /// <summary>How long the threads of one vCPU were ready and not let run.</summary>
    /// <param name="InGapMs">Between the guest's last look at the source and its first at the destination.</param>
    /// <param name="InMoveMs">From the beginning of the move until that first look.</param>
    internal readonly record struct Found(double InGapMs, double InMoveMs)
    {
        internal Found And(TimeSpan both) => new(InGapMs + both.TotalMilliseconds, InMoveMs + both.TotalMilliseconds);
    }

    /// <summary>After a move.</summary>
    /// <param name="found">What the guest found at the destination.</param>
    /// <param name="sourceNs">The source's thread, before and when it is parked.</param>
    /// <param name="stolenNs">The guest's count in the memory of the source.</param>
    /// <param name="destinationNs">The destination's thread before the move.</param>
    internal Found OnMove(MemCheckGuest.Found found, (ulong Before, ulong After) sourceNs, ulong stolenNs, ulong destinationNs)
    {
        double leaving = (double)sourceNs.After - (found.StolenBeforeNs - _baseNs), entering = Math.Max(0, (double)(found.StolenAfterNs - stolenNs) - destinationNs);
        _baseNs = stolenNs;
        return new Found((Math.Max(0, leaving) + entering) / 1e6, (sourceNs.After - sourceNs.Before + entering) / 1e6);
    }

    /// <summary>The guest's memory was replaced while its vCPU was stopped.</summary>
    internal void OnLoad(ulong stolenBeforeNs, ulong stolenAfterNs) => _baseNs += stolenAfterNs - stolenBeforeNs;
}
