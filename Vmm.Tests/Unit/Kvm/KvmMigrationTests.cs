using System.Diagnostics;
using System.Globalization;
using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.RunStates;
using Vmm.Migration.Channels;
using Vmm.Migration.State;
using Vmm.Tools.Cli.Guests;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>A real guest moves, between two VMs of this process.</summary>
[NonParallelizable]
internal sealed class KvmMigrationTests
{
    [Test]
    public async Task A_guest_moves_live_without_a_wrong_word_and_sees_its_downtime_once()
    {
        const int hops = 6;
        var gaps = new List<Gap>();
        KvmGuest at = KvmGuest.MemCheck();
        try
        {
            at.Vm.Cont();
            KvmGuest.WaitFor(() => at.Found.Rounds > 2, "two rounds");
            for (int hop = 0; hop < hops; hop++)
            {
                at.Vm.Stop();
                MemCheckGuest.ClearGap(at.Vm.Memory);
                double waitBefore = WaitMs(at);
                at.Vm.Cont();
                KvmGuest to = KvmGuest.MemCheck(incoming: true);
                Task<MigrationStatus> incoming = to.Test.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
                Task<MigrationStatus> outgoing = at.Test.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{to.Test.Engine.Query().SocketAddresses[0].Port}"));
                Assert.That(await outgoing.WaitAsync(KvmGuest.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{at.Test.Engine.Query().Error} / {to.Test.Engine.Query().Error}");
                Assert.That(await incoming.WaitAsync(KvmGuest.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{to.Test.Engine.Query().Error}");
                double reportedMs = at.Test.Engine.Query().Downtime!.TotalMs, waitMs = WaitMs(at) - waitBefore;
                double awayMs = Stopwatch.GetElapsedTime(at.Kvm.ParkedAt, to.Kvm.StartedAt).TotalMilliseconds;
                at.Dispose();
                at = to;
                ulong rounds = at.Found.Rounds;
                KvmGuest.WaitFor(() => at.Found.Rounds > rounds + 2, "two more rounds");
                MemCheckGuest.Found found = at.Found;
                double guestMs = found.MaxGapTicks / (double)at.Kvm.CpuStates[0].TscKhz;
                gaps.Add(new Gap(guestMs, (found.MaxClockGapNs / 1e6) ?? guestMs, awayMs, reportedMs, waitMs + WaitMs(at)));
                Assert.That((at.Found.Errors, at.Found.BackSteps), Is.EqualTo((0ul, 0ul)));
            }
            string all = string.Join("\n", gaps);
            TestContext.Out.WriteLine(all);
            Assert.Multiple(() =>
            {
                foreach (Gap gap in gaps)
                {
                    double tolerance = 2 + 0.05 * gap.AwayMs;
                    Assert.That(gap.GuestMs, Is.GreaterThanOrEqualTo(gap.AwayMs - tolerance), all);
                    // What the host's scheduler adds is no downtime; the kernel says how much that was.
                    Assert.That(gap.GuestMs, Is.LessThanOrEqualTo(gap.AwayMs + tolerance + gap.WaitMs), all);
                    Assert.That(gap.ReportedMs, Is.GreaterThanOrEqualTo(gap.AwayMs), all);
                    Assert.That(gap.ClockMs, Is.EqualTo(gap.GuestMs).Within(tolerance), all);
                }
                // The report ends with the confirmation, for which a thread of the source waits its turn: the quietest hop shows what is measured.
                Assert.That(gaps.Min(static g => Math.Abs(g.ReportedMs - g.GuestMs) - 0.05 * g.ReportedMs), Is.LessThanOrEqualTo(2), all);
            });
        }
        finally
        {
            at.Dispose();
        }
    }

    /// <summary>One hop's downtime as the guest's two clocks, the two vCPU threads and the report have it, and how long the host let the vCPUs wait.</summary>
    private sealed record Gap(double GuestMs, double ClockMs, double AwayMs, double ReportedMs, double WaitMs);

    /// <summary>How long the guest's vCPU was ready and not let run so far: second field of its thread's schedstat.</summary>
    private static double WaitMs(KvmGuest guest) =>
        double.Parse(File.ReadAllText($"/proc/self/task/{guest.Kvm.Vcpus[0].ThreadId}/schedstat").Split(' ')[1], CultureInfo.InvariantCulture) / 1e6;

    [Test]
    public async Task A_guest_that_is_always_in_the_middle_of_an_access_moves()
    {
        // It reads and writes a port for ever, and counts in a register: a lost or repeated access would break the count.
        byte[] image = GuestPrograms.PortCounter();
        using var source = new KvmGuest(image);
        using var destination = new KvmGuest(image, incoming: true);
        source.Vm.Cont();
        KvmGuest.WaitFor(() => source.Kvm.Vcpus[0].Exits > 500, "500 exits");
        Task<MigrationStatus> incoming = destination.Test.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        Task<MigrationStatus> outgoing = source.Test.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{destination.Test.Engine.Query().SocketAddresses[0].Port}"));
        Assert.That(await outgoing.WaitAsync(KvmGuest.Deadline), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(await incoming.WaitAsync(KvmGuest.Deadline), Is.EqualTo(MigrationStatus.Completed));
        KvmGuest.WaitFor(() => destination.Kvm.Vcpus[0].Exits > 500, "500 exits");
        destination.Vm.Stop();
        Assert.That(destination.Vm.RunState.State, Is.EqualTo(RunState.Paused));
        Assert.That(destination.Kvm.Failure, Is.Null);
        Assert.That(destination.Test.Ram.ReadOnlySlice(0x180000, 8).ToArray(), Is.All.Zero, "no wrong value was read back");
    }
}
