using Vmm.Tests.Fakes;
using Vmm.Tests.Unit.Kvm;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Guests;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

/// <summary>A real guest that checks its memory moves between real processes.</summary>
[NonParallelizable]
internal sealed class KvmMoveTests : KvmEndToEnd
{
    private const int SnapshotEvery = 3;

    [TestCase(3)]
    [TestCase(50, Category = "slow", Explicit = true)]
    [CancelAfter(900_000)]
    public async Task A_guest_moves_from_process_to_process_and_through_snapshots_without_a_wrong_word_and_sees_the_downtime_that_the_VMM_reports(int hops)
    {
        KvmGuest.Require();
        double ticksPerMs = TicksPerMs();
        var delay = new VcpuDelay();
        var moves = new GuestMoves();
        PeerProcess at = await Start("vm0");
        MemCheckGuest.Found found = await Past(at, 2);
        for (int hop = 1; moves.WantsMore(hops); hop++)
        {
            PeerProcess to = await Start($"vm{hop}", "--incoming", "tcp:127.0.0.1:0");
            (found, GuestMove move) = await Move(at, $"vm{hop - 1}", to, delay, ticksPerMs, found.Rounds);
            at = to;
            moves.Add(move);
            if (hop % SnapshotEvery == 0) found = await ThroughSnapshot(at, $"vm{hop}", found, delay);
        }
        moves.Check();
    }

    [Test]
    public async Task A_guest_moves_with_rings_of_written_pages([Values(1024, 65536)] int entries)
    {
        KvmGuest.Require();
        string accelerator = $"kvm,dirty-ring-size={entries}";
        var delay = new VcpuDelay();
        PeerProcess at = await StartWith(accelerator, "vm0");
        MemCheckGuest.Found found = await Past(at, 2);
        // Every process but the last has dirty rings: a guest must also move to a process that finds dirty pages by bitmap.
        for (int hop = 1; hop <= 3; hop++)
        {
            PeerProcess to = await StartWith(hop == 3 ? "kvm" : accelerator, $"vm{hop}", "--incoming", "tcp:127.0.0.1:0");
            (found, _) = await Move(at, $"vm{hop - 1}", to, delay, TicksPerMs(), found.Rounds);
            at = to;
        }
        Assert.That(found.Stops, Is.EqualTo(3ul), "the guest noticed each move");
    }

    [TestCase("kvm,dirty-ring-size=1000", "a dirty ring of 1000 entries: expected a power of two from")]
    [TestCase("kvm,dirty-ring-size=32", "a dirty ring of 32 entries: expected a power of two from")]
    [TestCase("kvm,dirty-ring-size=1073741824", "a dirty ring of 1073741824 entries: expected a power of two from")]
    [TestCase("auto,dirty-ring-size=1000", "a dirty ring of 1000 entries: expected a power of two from")]
    [TestCase("kvm,dirty-ring-size=-1", "'dirty-ring-size' must be a number of entries, found '-1'")]
    [TestCase("kvm,dirty-ring-size=many", "'dirty-ring-size' must be a number of entries, found 'many'")]
    [TestCase("kvm,dirty-ring=1024", "'dirty-ring' is not known; known: dirty-ring-size")]
    [TestCase("none,dirty-ring-size=1024", "'dirty-ring-size' is not known")]
    public async Task A_ring_that_cannot_be_is_refused(string accelerator, string message)
    {
        KvmGuest.Require();
        CliResult result = await Vmm.Run("run", "--accel", accelerator, "--kernel", "builtin:memcheck", "--memory", "3M");
        Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Usage, result.Error)));
        Assert.That(result.Error, Does.Contain(message));
    }

    private async Task<MemCheckGuest.Found> ThroughSnapshot(PeerProcess at, string name, MemCheckGuest.Found found, VcpuDelay delay)
    {
        await Vmm.Ok("savevm", "one", "--vm", name);
        await Past(at, Math.Max((await Read(at)).Rounds, found.Rounds) + 4);
        await Vmm.Ok("stop", "--vm", name);
        MemCheckGuest.Found later = await Read(at);
        ulong before = await Stolen(at);
        await Vmm.Ok("loadvm", "one", "--vm", name);
        delay.OnLoad(before, await Stolen(at));
        Assert.That((await Read(at)).Rounds, Is.LessThan(later.Rounds), "the guest is back in time, and still stopped");
        await Vmm.Ok("cont", "--vm", name);
        return await Past(at, later.Rounds + 1);
    }

    private static double TicksPerMs()
    {
        using KvmGuest probe = KvmGuest.MemCheck();
        return probe.Kvm.CpuStates[0].TscKhz;
    }
}
