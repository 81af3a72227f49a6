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
        const int hops = 4;
        var gaps = new List<(double Guest, double Vmm)>();
        KvmGuest at = KvmGuest.MemCheck();
        try
        {
            at.Vm.Cont();
            KvmGuest.WaitFor(() => at.Found.Rounds > 2, "two rounds");
            for (int hop = 0; hop < hops; hop++)
            {
                at.Vm.Stop();
                MemCheckGuest.ClearGap(at.Vm.Memory);
                at.Vm.Cont();
                KvmGuest to = KvmGuest.MemCheck(incoming: true);
                Task<MigrationStatus> incoming = to.Test.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
                Task<MigrationStatus> outgoing = at.Test.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{to.Test.Engine.Query().SocketAddresses[0].Port}"));
                Assert.That(await outgoing.WaitAsync(KvmGuest.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{at.Test.Engine.Query().Error} / {to.Test.Engine.Query().Error}");
                Assert.That(await incoming.WaitAsync(KvmGuest.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{to.Test.Engine.Query().Error}");
                double downtimeMs = at.Test.Engine.Query().Downtime!.TotalMs;
                at.Dispose();
                at = to;
                ulong rounds = at.Found.Rounds;
                KvmGuest.WaitFor(() => at.Found.Rounds > rounds + 2, "two more rounds");
                gaps.Add((at.Found.MaxGapTicks / (double)at.Kvm.CpuStates[0].TscKhz, downtimeMs));
                Assert.That((at.Found.Errors, at.Found.BackSteps), Is.EqualTo((0ul, 0ul)));
            }
            TestContext.Out.WriteLine(string.Join("; ", gaps.Select(static g => $"guest {g.Guest:f1} ms, vmm {g.Vmm:f1} ms")));
            // A gap is also what the host's scheduler makes of it; the best hop shows what the clocks do.
            Assert.That(gaps.Min(static g => Math.Abs(g.Guest - g.Vmm) - 0.05 * g.Vmm), Is.LessThanOrEqualTo(2), string.Join("; ", gaps));
        }
        finally
        {
            at.Dispose();
        }
    }

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
