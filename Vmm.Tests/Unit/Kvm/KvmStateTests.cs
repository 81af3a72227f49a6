using System.Reflection;
using Vmm.Core.Errors;
using Vmm.Core.Kvm;
using Vmm.Core.Memory;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Guests;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>The complete state of a vCPU and of the kernel's chips migrates.</summary>
internal sealed class KvmStateTests
{
    private static readonly FieldInfo[] s_items = [.. typeof(KvmCpuState).GetFields(BindingFlags.Instance | BindingFlags.NonPublic).Where(static f => !f.Name.StartsWith('_'))];

    /// <summary>Items that may be equal in all VMs: the start of the guest sets the TSC; the others describe the host or the size of further items.</summary>
    private static readonly string[] s_notValues = [nameof(KvmCpuState.Tsc), nameof(KvmCpuState.TscKhz), nameof(KvmCpuState.CpuidBytes), nameof(KvmCpuState.XsaveLength), nameof(KvmCpuState.MsrCount), nameof(KvmCpuState.MsrIndex)];

    [Test]
    public void Every_item_of_every_vCPU_is_the_same_after_a_save_and_a_load_into_another_VM([Values(1, 2)] int cpus)
    {
        using KvmGuest source = Fresh(cpus), destination = Fresh(cpus), untouched = Fresh(cpus);
        using (source.Vm.Bql.Acquire()) source.Kvm.Clock.SaveClock();
        for (int i = 0; i < cpus; i++)
        {
            KvmCpuState from = source.Kvm.CpuStates[i], to = destination.Kvm.CpuStates[i], none = untouched.Kvm.CpuStates[i];
            byte[] wire;
            using (source.Vm.Bql.Acquire())
            {
                from.Save();
                KvmStateValues.Change(from, i);
                from.Load();
                List<uint> fixedOnes = KvmStateValues.ChangeMsrs(from, i);
                TestContext.Out.WriteLine($"vCPU {i}: {from.MsrCount} MSRs, without another value {string.Join(", ", fixedOnes.Select(static m => $"0x{m:x}"))}");
                Assert.That(fixedOnes, Has.Count.LessThan(from.MsrCount / 2));
                wire = SectionBytes.Save(KvmCpuState.Description.Bind(from));
            }
            Dictionary<string, byte[]> sent = Items(from);
            using (untouched.Vm.Bql.Acquire()) none.Save();
            Dictionary<string, byte[]> usual = Items(none);
            Assert.That(sent, Has.Count.GreaterThan(14));
            Assert.That(sent.Keys.Except(s_notValues).Where(k => sent[k].SequenceEqual(usual[k])), Is.Empty, "these items would be equal without a move");
            using (destination.Vm.Bql.Acquire())
            {
                SectionBytes.Load(KvmCpuState.Description.Bind(to), wire);
                to.Save();
            }
            Dictionary<string, byte[]> got = Items(to);
            uint sentCount = TakeCount(sent), gotCount = TakeCount(got);
            Assert.That(gotCount, Is.InRange(sentCount - 0x1000_0000, sentCount), "the APIC timer continues from its count");
            // The start of the guest sets the TSC (TscsKeepTheirDistance checks it); everything else must be equal now.
            Assert.That(sent.Keys.Where(k => k != nameof(KvmCpuState.Tsc) && !sent[k].SequenceEqual(got[k])).Select(k => $"{k}: {Differences(sent[k], got[k])}"), Is.Empty);
        }
        TscsKeepTheirDistance(source, destination);
    }

    /// <summary>The VMM sets all TSCs for the same moment, so the difference between the TSCs of two vCPUs does not change by a tick.</summary>
    private static void TscsKeepTheirDistance(KvmGuest source, KvmGuest destination)
    {
        destination.Kvm.Clock.StartClock();
        destination.Kvm.Clock.SaveClock();
        ulong[] sent = [.. source.Kvm.CpuStates.Select(static s => s.Tsc)];
        foreach (KvmCpuState state in destination.Kvm.CpuStates) state.Save();
        ulong[] got = [.. destination.Kvm.CpuStates.Select(static s => s.Tsc)];
        for (int i = 0; i < sent.Length; i++)
        {
            Assert.That(got[i], Is.GreaterThanOrEqualTo(sent[i]));
            Assert.That(got[i] - got[0], Is.EqualTo(sent[i] - sent[0]), $"vCPU {i}");
        }
    }

    /// <summary>Takes the current count of the APIC timer out of the comparison, because the timer keeps counting.</summary>
    private static uint TakeCount(Dictionary<string, byte[]> items)
    {
        Span<byte> count = items[nameof(KvmCpuState.Lapic)].AsSpan(KvmStateValues.ApicCurrentCount, 4);
        uint value = BitConverter.ToUInt32(count);
        count.Clear();
        return value;
    }

    [Test]
    public void A_guest_of_a_lesser_CPU_keeps_it_on_a_greater_host_and_can_go_back()
    {
        using KvmGuest source = Fresh(1), destination = Fresh(1);
        KvmCpuState from = source.Kvm.CpuStates[0], to = destination.Kvm.CpuStates[0];
        from.Save();
        KvmStateValues.Change(from, 0);
        from.Load();
        byte[] lesser = [.. from.Cpuid];
        to.Save();
        Assert.That(Differences(lesser, to.Cpuid), Is.Not.Empty, "this host has some of these features");
        SectionBytes.Load(KvmCpuState.Description.Bind(to), SectionBytes.Save(KvmCpuState.Description.Bind(from)));
        SectionBytes.Load(KvmCpuState.Description.Bind(from), SectionBytes.Save(KvmCpuState.Description.Bind(to)));
        from.Save();
        Assert.That(Differences(lesser, from.Cpuid), Is.Empty);
    }

    [Test]
    public void The_chips_are_the_same_after_a_save_and_a_load_into_another_VM()
    {
        using KvmGuest source = Fresh(1), destination = Fresh(1), untouched = Fresh(1);
        KvmIrqChips from = source.Kvm.Chips, to = destination.Kvm.Chips, none = untouched.Kvm.Chips;
        from.Get();
        KvmStateValues.Change(from);
        from.Set();
        SectionBytes.Load(KvmPic.Description.Bind(to.Master), SectionBytes.Save(KvmPic.Description.Bind(from.Master)));
        SectionBytes.Load(KvmPic.Description.Bind(to.Slave), SectionBytes.Save(KvmPic.Description.Bind(from.Slave)));
        SectionBytes.Load(KvmIoApic.Description.Bind(to.IoApic), SectionBytes.Save(KvmIoApic.Description.Bind(from.IoApic)));
        SectionBytes.Load(KvmPit.Description.Bind(to.Pit), SectionBytes.Save(KvmPit.Description.Bind(from.Pit)));
        byte[][] sent = Raw(from);
        to.Get();
        none.Get();
        byte[][] got = Raw(to), usual = Raw(none);
        for (int i = 0; i < sent.Length; i++)
        {
            Assert.That(Differences(sent[i], usual[i]), Is.Not.Empty, $"chip {i} would be equal without a move");
            Assert.That(Differences(sent[i], got[i]), Is.Empty, $"chip {i}");
        }
    }

    private static byte[][] Raw(KvmIrqChips chips)
    {
        byte[][] all = [.. chips.Raw.Select(static c => (byte[])c.Clone())];
        // The kernel stamps the PIT's count_load_time, s64 at 16 of each 24-byte channel, with its own time.
        for (int channel = 0; channel < 3; channel++) all[^1].AsSpan(channel * 24 + 16, 8).Clear();
        return all;
    }

    [Test]
    public void The_clocks_count_the_time_between_once()
    {
        using KvmGuest source = Stopped(), destination = KvmGuest.MemCheck(incoming: true);
        KvmClock from = source.Kvm.Clock, to = destination.Kvm.Clock;
        SectionBytes.Load(KvmClock.Description.Bind(to), SectionBytes.Save(KvmClock.Description.Bind(from)));
        SectionBytes.Load(KvmCpuState.Description.Bind(destination.Kvm.CpuStates[0]), SectionBytes.Save(KvmCpuState.Description.Bind(source.Kvm.CpuStates[0])));
        (ulong clock, ulong real, ulong tsc) = (from.ClockNs, from.RealtimeNs, source.Kvm.CpuStates[0].Tsc);
        to.StartClock();
        to.SaveClock();
        destination.Kvm.CpuStates[0].Save();
        double awayMs = (to.RealtimeNs - real) / 1e6, clockMs = (to.ClockNs - (double)clock) / 1e6;
        double tscMs = (destination.Kvm.CpuStates[0].Tsc - (double)tsc) / destination.Kvm.CpuStates[0].TscKhz;
        Assert.That((clockMs, tscMs), Is.EqualTo((awayMs, awayMs)).Using<(double, double)>(static (x, y) => Math.Abs(x.Item1 - y.Item1) < 2 && Math.Abs(x.Item2 - y.Item2) < 2));
    }

    [Test]
    public void A_CPU_with_more_features_is_refused_before_anything_is_changed()
    {
        using KvmGuest source = Stopped(), destination = KvmGuest.MemCheck(incoming: true);
        KvmCpuState from = source.Kvm.CpuStates[0], to = destination.Kvm.CpuStates[0];
        byte[] wire = SectionBytes.Save(KvmCpuState.Description.Bind(from));
        ulong before = destination.Kvm.Vcpus[0].GetRegs().Rip;
        CpuidEntry2[] entries = KvmCpuid.For(0, 1, destination.Kvm.Vm.System);
        int leaf = Array.FindIndex(entries, static e => e.Function == 0x80000001);
        // Bit 28 of ecx in leaf 0x80000001 stands for last-level cache counters, which none of our KVM guests has.
        wire[4 + leaf * 40 + 20 + 3] |= 0x10;
        Exception e = Caught.By(() => SectionBytes.Load(KvmCpuState.Description.Bind(to), wire))!;
        Assert.That(e.Message, Does.Contain("features that this host lacks: perfctr_llc; CPUID 0x80000001.0 ecx bits 0x10000000"));
        Assert.That(destination.Kvm.Vcpus[0].GetRegs().Rip, Is.EqualTo(before));
    }

    [TestCase(2, 1)]
    [TestCase(1, 2)]
    public void Another_number_of_CPUs_is_refused_as_such(int saved, int ours)
    {
        using var source = new KvmGuest(SmpGuest.BuildSpinning(), cpus: saved);
        using var destination = new KvmGuest(SmpGuest.BuildSpinning(), cpus: ours);
        byte[] wire = SectionBytes.Save(KvmCpuState.Description.Bind(source.Kvm.CpuStates[0]));
        Exception e = Caught.By(() => SectionBytes.Load(KvmCpuState.Description.Bind(destination.Kvm.CpuStates[0]), wire))!;
        Assert.That(e.GetBaseException(), Is.TypeOf<IncompatibleStateException>().With.Message.EqualTo($"vCPU 0: the guest has {saved} vCPUs, this VM {ours}"));
        Assert.That(((IncompatibleStateException)e.GetBaseException()).Hint, Is.EqualTo($"make this VM with {saved} vCPUs"));
    }

    [Test]
    public void An_unknown_register_is_refused()
    {
        using KvmGuest source = Stopped();
        KvmCpuState state = source.Kvm.CpuStates[0];
        state.Save();
        state.MsrIndex = [.. state.MsrIndex, 0x12345];
        state.MsrData = [.. state.MsrData, 1];
        state.MsrCount++;
        Assert.That(state.Load, Throws.TypeOf<IncompatibleStateException>().With.Message.Contains("0x12345"));
    }

    [Test]
    public void Memory_is_left_alone_by_what_prepares_a_load_and_only_a_reset_of_the_machine_loads_the_program_again()
    {
        using KvmGuest guest = Stopped();
        byte[] program = new byte[64], written = [.. Enumerable.Repeat((byte)0xa5, 64)], found = new byte[64];
        guest.Vm.Memory.Read(new GuestAddress(GuestImage.FlatAddress), program);
        guest.Vm.Memory.Write(new GuestAddress(GuestImage.FlatAddress), written);
        using (guest.Vm.Bql.Acquire()) guest.Vm.ResetDevices();
        guest.Vm.Memory.Read(new GuestAddress(GuestImage.FlatAddress), found);
        Assert.That(found, Is.EqualTo(written));
        guest.Vm.Reset();
        guest.Vm.Memory.Read(new GuestAddress(GuestImage.FlatAddress), found);
        Assert.That(found, Is.EqualTo(program));
    }

    private static KvmGuest Fresh(int cpus) => new(MemCheckGuest.Build(3 << 20), 3 << 20, cpus, incoming: true);

    private static KvmGuest Stopped()
    {
        KvmGuest guest = KvmGuest.MemCheck();
        guest.Vm.Cont();
        KvmGuest.WaitFor(() => guest.Found.Rounds > 1, "a round");
        guest.Vm.Stop();
        return guest;
    }

    private static Dictionary<string, byte[]> Items(KvmCpuState state) => s_items.ToDictionary(static f => f.Name, f => f.GetValue(state) switch
    {
        byte[] bytes => (byte[])bytes.Clone(),
        uint[] words => [.. words.SelectMany(BitConverter.GetBytes)],
        ulong[] words => [.. words.SelectMany(BitConverter.GetBytes)],
        uint word => BitConverter.GetBytes(word),
        ulong word => BitConverter.GetBytes(word),
        var other => throw new InvalidOperationException($"{f.Name}: {other?.GetType()}"),
    });

    private static string Differences(byte[] a, byte[] b) =>
        a.Length != b.Length ? $"{a.Length} and {b.Length} bytes" : string.Join(", ", Enumerable.Range(0, a.Length).Where(i => a[i] != b[i]).Take(16).Select(i => $"[{i}] {a[i]:x2} {b[i]:x2}"));
}
