using System.Diagnostics;
using Vmm.Core.Kvm;
using Vmm.Core.RunStates;
using Vmm.Tools.Cli.Guests;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>How soon and how surely vCPUs leave the guest.</summary>
[NonParallelizable]
internal sealed class KvmStopTests
{
    [TestCase(10_000)]
    [TestCase(1_000_000, Category = "slow", Explicit = true)]
    public void No_kick_is_lost(int kicks)
    {
        using KvmGuest guest = KvmGuest.MemCheck();
        guest.Vm.Cont();
        KvmVcpu vcpu = guest.Kvm.Vcpus[0];
        for (int i = 0; i < kicks; i++)
        {
            long before = vcpu.Kicks;
            vcpu.Kick();
            long start = Stopwatch.GetTimestamp();
            while (vcpu.Kicks == before)
            {
                Thread.SpinWait(10);
                if (Stopwatch.GetElapsedTime(start) > KvmGuest.Deadline) Assert.Fail($"kick {i} was lost");
            }
        }
        ulong rounds = guest.Found.Rounds;
        KvmGuest.WaitFor(() => guest.Found.Rounds > rounds, "the guest goes on");
    }

    /// <summary>With more vCPUs than processors, and other work beside, a stop waits for the host's scheduler; the strict limit is for a quiet host.</summary>
    [TestCase(100, 5000)]
    [TestCase(1000, 1, Category = "slow", Explicit = true)]
    public void Four_spinning_vCPUs_are_parked_soon(int stops, double p99LimitMs)
    {
        using var guest = new KvmGuest(SmpGuest.BuildSpinning(), cpus: 4);
        guest.Vm.Cont();
        KvmGuest.WaitFor(() => guest.Test.Ram.ReadOnlySlice(SmpGuest.StateAddress, 1)[0] == 3, "three more vCPUs");
        double[] ms = new double[stops];
        for (int i = 0; i < stops; i++)
        {
            using (guest.Vm.Bql.Acquire())
            {
                long start = Stopwatch.GetTimestamp();
                guest.Kvm.OnVmStateChange(running: false, RunState.Paused);
                ms[i] = Stopwatch.GetElapsedTime(start).TotalMilliseconds;
                guest.Kvm.OnVmStateChange(running: true, RunState.Running);
            }
            // Long enough for all of them to be in the guest again.
            KvmGuest.WaitFor(() => guest.Kvm.Vcpus.All(static v => v.IsRunning), "all vCPUs run");
        }
        Array.Sort(ms);
        TestContext.Out.WriteLine($"stop latency: median {ms[stops / 2]:f3} ms, p99 {ms[stops * 99 / 100]:f3} ms, max {ms[^1]:f3} ms");
        Assert.That(ms[stops * 99 / 100], Is.LessThanOrEqualTo(p99LimitMs));
    }
}
