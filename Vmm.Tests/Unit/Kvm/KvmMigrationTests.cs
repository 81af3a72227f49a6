using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tools.Cli.Guests;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>A real guest moves between two VMs of this process.</summary>
[NonParallelizable]
internal sealed class KvmMigrationTests
{
    [Test]
    public async Task A_guest_moves_live_without_a_wrong_word_and_sees_its_downtime_once()
    {
        const int hops = 6;
        var moves = new GuestMoves();
        var delay = new VcpuDelay();
        KvmGuest at = KvmGuest.MemCheck();
        try
        {
            at.Vm.Cont();
            KvmGuest.WaitFor(() => at.Found.Rounds > 2, "two rounds");
            while (moves.WantsMore(hops))
            {
                KvmGuest to = KvmGuest.MemCheck(incoming: true);
                ulong waitBefore = WaitNs(to), sourceBefore = WaitNs(at);
                TimeSpan pauses = GC.GetTotalPauseDuration(); // A GC pause stops all threads of this process, the vCPUs' too, and the kernel does not count it.
                Task<MigrationStatus> incoming = to.Test.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
                Task<MigrationStatus> outgoing = at.Test.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{to.Test.Engine.Query().SocketAddresses[0].Port}"));
                Assert.That(await outgoing.WaitAsync(KvmGuest.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{at.Test.Engine.Query().Error} / {to.Test.Engine.Query().Error}");
                Assert.That(await incoming.WaitAsync(KvmGuest.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{to.Test.Engine.Query().Error}");
                DowntimeReport source = at.Test.Engine.Query().Downtime!, destination = to.Test.Engine.Query().Downtime!;
                ulong wait = WaitNs(at), stolen = Stolen(at);
                at.Dispose();
                at = to;
                ulong rounds = at.Found.Rounds;
                KvmGuest.WaitFor(() => at.Found.Rounds > rounds + 2, "two more rounds");
                MemCheckGuest.Found found = at.Found;
                moves.Add(new GuestMove(found.StopGapTicks / (double)at.Kvm.CpuStates[0].TscKhz, found.StopGapNs / 1e6, (destination.GuestAtNs - source.GuestAtNs) / 1e6,
                    source.TotalMs, delay.OnMove(found, (sourceBefore, wait), stolen, waitBefore).And(GC.GetTotalPauseDuration() - pauses)));
                Assert.That((at.Found.Errors, at.Found.BackSteps), Is.EqualTo((0ul, 0ul)));
            }
            moves.Check();
            // The reported downtime includes the wait of a source thread for a processor to read the confirmation, so check the hop with the shortest wait.
            Assert.That(moves.All.Min(static m => Math.Abs(m.ReportedMs - m.GuestMs) - 0.05 * m.ReportedMs), Is.LessThanOrEqualTo(2));
        }
        finally
        {
            at.Dispose();
        }
    }

    private static ulong Stolen(KvmGuest guest)
    {
        byte[] word = new byte[8];
        guest.Vm.Memory.Read(new GuestAddress(MemCheckGuest.StealAddress), word);
        return BitConverter.ToUInt64(word);
    }

    private static ulong WaitNs(KvmGuest guest) => VcpuDelay.WaitNs(Environment.ProcessId, guest.Kvm.Vcpus[0].ThreadId);

    [Test]
    public async Task A_guest_that_is_always_in_the_middle_of_an_access_moves()
    {
        // The guest reads and writes a port for ever and counts in a register, so a lost or repeated access would break the count.
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
        Assert.That(destination.Test.Ram.ReadOnlySlice(0x180000, 8).ToArray(), Is.All.Zero, "the guest read no wrong value back");
    }
}
