using System.Buffers.Binary;
using Vmm.Core.SaveVm;
using Vmm.Tests.Support;
using Vmm.Tests.Unit.Kvm;

namespace Vmm.Tests.Interop;

/// <summary>The in-kernel PIC, IOAPIC and PIT have QEMU's sections: body and VMDESC load and save between KVM and QEMU in both directions.</summary>
[TestFixture, Category(QemuVersions.Category)]
internal sealed class KvmChipQemuTests
{
    private const string Pic = "i8259", IoApic = "ioapic", Pit = "i8254";

    private static readonly (string Name, uint Instance)[] s_sections = [(Pic, 0), (Pic, 1), (IoApic, 0), (Pit, 0)];

    private static string[] Versions => QemuVersions.All;

    [TestCaseSource(nameof(Versions))]
    public void WhatQemuSavesTheKernelTakesAndItIsSavedTheSame(string version)
    {
        using QemuProcess qemu = MicrovmStream.Start(version);
        MicrovmStream stream = MicrovmStream.Save(qemu);
        using KvmGuest guest = KvmGuest.MemCheck(incoming: true);
        foreach ((string name, uint instance) in s_sections)
        {
            byte[] body = stream.Body(name, instance);
            Assert.That(Timeless(name, ThroughTheKernel(guest, name, instance, body)), Is.EqualTo(Timeless(name, body)), $"{name}/{instance}");
            stream.AssertDescribes(guest.Vm.SaveVm.Find(name, (int)instance)!);
        }
    }

    [TestCaseSource(nameof(Versions))]
    public void WhatTheKernelHasQemuTakesAndSavesTheSame(string version)
    {
        using QemuProcess source = MicrovmStream.Start(version);
        MicrovmStream stream = MicrovmStream.Save(source);
        using KvmGuest guest = KvmGuest.MemCheck(incoming: true);
        var ours = new Dictionary<(string, uint), byte[]>();
        foreach ((string name, uint instance) in s_sections)
        {
            byte[] used = Used(name, stream.Body(name, instance));
            byte[] kernel = ours[(name, instance)] = ThroughTheKernel(guest, name, instance, used);
            Assert.That(Timeless(name, kernel), Is.EqualTo(Timeless(name, used)), $"{name}/{instance}");
            stream.Replace(name, instance, kernel);
        }
        using QemuProcess target = MicrovmStream.Start(version, "-incoming", "defer");
        stream.Load(target);
        MicrovmStream again = MicrovmStream.Save(target);
        foreach ((string name, uint instance) in s_sections) Assert.That(again.Body(name, instance), Is.EqualTo(ours[(name, instance)]), $"{name}/{instance}");
    }

    private static byte[] ThroughTheKernel(KvmGuest guest, string name, uint instance, byte[] body)
    {
        SaveVmEntry entry = guest.Vm.SaveVm.Find(name, (int)instance)!;
        SectionBytes.Load(entry.VmState!, body);
        return SectionBytes.Save(entry.VmState!);
    }

    /// <summary>The section of a chip as a guest's kernel programs it after power-on.</summary>
    private static byte[] Used(string name, byte[] body)
    {
        byte[] used = [.. body];
        switch (name)
        {
            case Pic:
                (used[2], used[4], used[5], used[6], used[13]) = (0xb8, 3, 0x30, 1, 1); // imr, priority_add, irq_base, read_reg_select, init4
                break;
            case IoApic:
                (used[0], used[1]) = (2, 0x18);
                BinaryPrimitives.WriteUInt64BigEndian(used.AsSpan(14 + (8 * 4)), 0x0100_0000_0001_0831);
                BinaryPrimitives.WriteUInt64BigEndian(used.AsSpan(14 + (8 * 21)), 0x0000_0000_0001_a942);
                break;
            default:
                BinaryPrimitives.WriteInt32BigEndian(used.AsSpan(4), 11932); // channel 0: 100 Hz
                (used[4 + 12], used[4 + 13]) = (3, 2); // rw_mode, mode
                used[4 + (2 * 32) + 15] = 1; // channel 2's gate
                break;
        }
        return used;
    }

    /// <summary>A copy without the times at which the PIT's counts began, because KVM sets new ones at load.</summary>
    private static byte[] Timeless(string name, byte[] body)
    {
        if (name != Pit) return body;
        byte[] copy = [.. body];
        for (int channel = 0; channel < 3; channel++) copy.AsSpan(4 + (channel * 32) + 16, 16).Clear();
        copy.AsSpan(100).Clear();
        return copy;
    }
}
