using System.Reflection;
using Vmm.Core.Errors;
using Vmm.Core.Kvm;
using Vmm.Tests.Support;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>What of a vCPU and of the kernel's chips migrates.</summary>
internal sealed class KvmStateTests
{
    private static readonly FieldInfo[] s_items = [.. typeof(KvmCpuState).GetFields(BindingFlags.Instance | BindingFlags.NonPublic).Where(static f => !f.Name.StartsWith('_'))];

    [Test]
    public void Every_item_of_a_vCPU_is_the_same_after_a_save_and_a_load_into_another_VM()
    {
        using KvmGuest source = Stopped(), destination = KvmGuest.MemCheck(incoming: true);
        KvmCpuState from = source.Kvm.CpuStates[0], to = destination.Kvm.CpuStates[0];
        using (source.Vm.Bql.Acquire())
        {
            source.Kvm.Machine.SaveClock();
            byte[] wire = SectionBytes.Save(KvmCpuState.Description.Bind(from));
            SectionBytes.Load(KvmCpuState.Description.Bind(to), wire);
        }
        Dictionary<string, byte[]> sent = Items(from);
        using (destination.Vm.Bql.Acquire()) to.Save();
        Dictionary<string, byte[]> got = Items(to);
        Assert.That(sent, Has.Count.GreaterThan(14));
        // The TSC is set when the guest starts, see below; everything else must be there now.
        Assert.That(sent.Keys.Where(k => k != nameof(KvmCpuState.Tsc) && !sent[k].SequenceEqual(got[k])).Select(k => $"{k}: {Differences(sent[k], got[k])}"), Is.Empty);
    }

    [Test]
    public void The_chips_are_the_same_after_a_save_and_a_load_into_another_VM()
    {
        using KvmGuest source = Stopped(), destination = KvmGuest.MemCheck(incoming: true);
        KvmIrqChips from = source.Kvm.Chips, to = destination.Kvm.Chips;
        SectionBytes.Load(KvmPic.Description.Bind(to.Master), SectionBytes.Save(KvmPic.Description.Bind(from.Master)));
        SectionBytes.Load(KvmPic.Description.Bind(to.Slave), SectionBytes.Save(KvmPic.Description.Bind(from.Slave)));
        SectionBytes.Load(KvmIoApic.Description.Bind(to.IoApic), SectionBytes.Save(KvmIoApic.Description.Bind(from.IoApic)));
        SectionBytes.Load(KvmPit.Description.Bind(to.Pit), SectionBytes.Save(KvmPit.Description.Bind(from.Pit)));
        byte[][] sent = [.. from.Raw.Select(static c => (byte[])c.Clone())];
        to.Get();
        IReadOnlyList<byte[]> got = to.Raw;
        // The kernel stamps the PIT's count_load_time, s64 at 16 of each 24-byte channel, with its own time.
        foreach (byte[] pit in (byte[][])[sent[^1], got[^1]])
            for (int channel = 0; channel < 3; channel++) pit.AsSpan(channel * 24 + 16, 8).Clear();
        for (int i = 0; i < sent.Length; i++) Assert.That(Differences(sent[i], got[i]), Is.Empty, $"chip {i}");
    }

    [Test]
    public void The_clocks_count_the_time_between_once()
    {
        using KvmGuest source = Stopped(), destination = KvmGuest.MemCheck(incoming: true);
        KvmMachineState from = source.Kvm.Machine, to = destination.Kvm.Machine;
        SectionBytes.Load(KvmMachineState.ClockDescription.Bind(to), SectionBytes.Save(KvmMachineState.ClockDescription.Bind(from)));
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
        // Bit 28 of leaf 0x80000001 ecx is performance counters, which no KVM guest of ours has.
        wire[4 + leaf * 40 + 20 + 3] |= 0x10;
        Exception e = Assert.Catch(() => SectionBytes.Load(KvmCpuState.Description.Bind(to), wire))!;
        Assert.That(e.Message, Does.Contain("features that this host lacks: CPUID 0x80000001.0 ecx bits 0x10000000"));
        Assert.That(destination.Kvm.Vcpus[0].GetRegs().Rip, Is.EqualTo(before));
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
