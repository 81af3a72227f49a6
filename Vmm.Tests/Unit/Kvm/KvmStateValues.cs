using System.Buffers.Binary;
using Vmm.Core.Kvm;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>
/// Values for every item of a vCPU and of the kernel's chips. No machine has them by itself, and they differ between vCPUs. Layouts: &lt;linux/kvm.h&gt;.
/// </summary>
internal static class KvmStateValues
{
    private const int XmmOffset = 160, XstateBv = 512, YmmOffset = 576;
    private const ulong Mix = 0x9e3779b97f4a7c15;

    // struct kvm_vcpu_events: exception{injected,nr,has_error_code,pending,error_code}, interrupt{injected,nr,soft,shadow}, nmi{injected,pending,masked}.
    private const int ExceptionInjected = 0, ExceptionNumber = 1, ExceptionHasCode = 2, ExceptionCode = 4, InterruptInjected = 8, InterruptNumber = 9, NmiPending = 13, NmiMasked = 14;

    /// <summary>Offset of the local APIC's current count, the only register set here that keeps counting.</summary>
    internal const int ApicCurrentCount = 0x390;

    /// <summary>Changes every item of a saved state; the caller loads it into the vCPU that the state came from.</summary>
    internal static void Change(KvmCpuState s, int cpu)
    {
        ulong own = (ulong)cpu + 1;
        for (int i = 0; i < 16; i++) Put(s.Regs, i * 8, Mix * ((ulong)i + own));
        Put(s.Regs, 16 * 8, 0x123000 + own);
        Put(s.Regs, 17 * 8, 0xcd7); // CF PF AF ZF SF DF OF
        Sregs(s, own);
        Fpu(s, own);
        for (int i = 0; i < 4; i++) Put(s.DebugRegs, i * 8, 0x1000 * ((ulong)i + own));
        Put(s.DebugRegs, 4 * 8, 0xffff0ff0 | own);
        Put(s.DebugRegs, 5 * 8, 0x402);
        foreach ((int at, uint value) in ((int, uint)[])[(0x80, 0x50), (0xd0, (uint)own << 24), (0xf0, 0x1ff), (0x110, 0x2), (0x210, 0x4), (0x280, 0x40), (0x320, 0x10040), (0x330, 0x10050),
            (0x340, 0x10060), (0x350, 0x10400), (0x360, 0x10070), (0x370, 0x10080), (0x380, 0xfffffff0), (ApicCurrentCount, 0xffff0000), (0x3e0, 0xa)])
            BinaryPrimitives.WriteUInt32LittleEndian(s.Lapic.AsSpan(at), value);
        s.VcpuEvents.AsSpan(0, 16).Clear();
        if (cpu == 0) (s.VcpuEvents[ExceptionInjected], s.VcpuEvents[ExceptionNumber], s.VcpuEvents[ExceptionHasCode], s.VcpuEvents[ExceptionCode]) = (1, 14, 1, 2);
        else (s.VcpuEvents[InterruptInjected], s.VcpuEvents[InterruptNumber]) = (1, 0x41);
        (s.VcpuEvents[NmiPending], s.VcpuEvents[NmiMasked]) = (1, 1);
        s.MpState = 3; // KVM_MP_STATE_HALTED
        s.Tsc = 0x1234_5678_9abc * own;
        // Pretend that the guest came from a host with a lesser CPU.
        CpuidEntry2[] entries = new CpuidEntry2[s.Cpuid.Length / 40];
        s.Cpuid.CopyTo(global::Vmm.Core.Interop.Ioctl.AsBytes<CpuidEntry2>(entries));
        int leaf = Array.FindIndex(entries, static e => e.Function == 1);
        entries[leaf].Ecx &= ~(1u << 13 | 1u << 22 | 1u << 23 | 1u << 30); // cx16, movbe, popcnt, rdrand
        s.Cpuid = [.. global::Vmm.Core.Interop.Ioctl.AsBytes<CpuidEntry2>(entries)];
    }

    /// <summary>Gives every MSR that accepts one a different value, and records in the state the value that the MSR then has.</summary>
    /// <returns>The MSRs that accept no different value.</returns>
    internal static List<uint> ChangeMsrs(KvmCpuState s, int cpu)
    {
        var fixedOnes = new List<uint>();
        for (int i = 0; i < s.MsrCount; i++)
        {
            ulong before = s.MsrData[i], value = 0;
            ulong own = (ulong)cpu * 0x40;
            ulong[] candidates = [0x0000_1234_5678_9000 + own, 0x0007_0406_0007_0406, 0x182000 + own, 0x182001 + own, 0x10, 1, 0xd01, 0x501, 2, 4, 0, before ^ 1, before ^ 0x10];
            bool found = candidates.Any(c => c != before && s.TryWriteMsr(s.MsrIndex[i], c) && s.TryReadMsr(s.MsrIndex[i], out value) && value == c);
            if (!found)
            {
                fixedOnes.Add(s.MsrIndex[i]);
                s.TryWriteMsr(s.MsrIndex[i], before);
            }
            else s.MsrData[i] = value;
        }
        return fixedOnes;
    }

    /// <summary>Changes the state of the interrupt controllers and the PIT that was read from the kernel; the caller writes it back.</summary>
    internal static void Change(KvmIrqChips chips)
    {
        const int chip = 8; // Behind chip_id and padding.
        for (int pic = 0; pic < 2; pic++)
        {
            Span<byte> state = chips.Raw[pic].AsSpan(chip);
            // last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask, init_state, auto_eoi, rotate, fully_nested, init4, elcr
            (state[0], state[1], state[2], state[3], state[4], state[5], state[6], state[8], state[11], state[14]) = (0x12, 0x22, 0x5a, 0x04, 3, (byte)(0x20 + 8 * pic), 1, 1, 1, (byte)(pic == 0 ? 0x08 : 0x0c));
        }
        Span<byte> ioapic = chips.Raw[2].AsSpan(chip);
        BinaryPrimitives.WriteUInt32LittleEndian(ioapic[8..], 0x12); // ioregsel
        BinaryPrimitives.WriteUInt32LittleEndian(ioapic[12..], 3); // id
        for (int pin = 0; pin < KvmVm.IrqChipPins; pin++) BinaryPrimitives.WriteUInt64LittleEndian(ioapic[(24 + pin * 8)..], 0x0100_0000_0001_0030 + (ulong)pin); // masked
        for (int channel = 0; channel < 3; channel++)
        {
            Span<byte> state = chips.Pit.Raw.AsSpan(channel * 24);
            BinaryPrimitives.WriteUInt32LittleEndian(state, 0x4a9u + (uint)channel);
            BinaryPrimitives.WriteUInt16LittleEndian(state[4..], (ushort)(0x123 + channel));
            // count_latched, status_latched, status, read_state, write_state, write_latch, rw_mode, mode, bcd, gate
            (state[6], state[7], state[8], state[9], state[10], state[11], state[12], state[13], state[15]) = (2, 1, 0x34, 3, 3, 0x77, 3, 5, (byte)(channel == 2 ? 0 : 1)); // Mode 5 waits for a trigger: no interrupt comes by itself.
        }
        BinaryPrimitives.WriteUInt32LittleEndian(chips.Pit.Raw.AsSpan(72), 2); // KVM_PIT_FLAGS_SPEAKER_DATA_ON
    }

    private static void Sregs(KvmCpuState s, ulong own)
    {
        const int segment = 24, gdt = 192, idt = 208, cr2 = 232, cr3 = 240, cr8 = 256;
        Put(s.Sregs, 3 * segment, 0x7000_0000_1000 * own); // fs
        Put(s.Sregs, 4 * segment, 0x7000_0000_2000 * own); // gs
        BinaryPrimitives.WriteUInt16LittleEndian(s.Sregs.AsSpan(segment + 12), 0x18); // selector of ds
        Put(s.Sregs, gdt, 0x5000 * own);
        Put(s.Sregs, idt, 0x6000 * own);
        BinaryPrimitives.WriteUInt16LittleEndian(s.Sregs.AsSpan(idt + 8), 0xfff);
        Put(s.Sregs, cr2, 0xdead_0000 + own);
        Put(s.Sregs, cr3, 0x9000 + 0x1000 * own);
        Put(s.Sregs, cr8, 5);
    }

    private static void Fpu(KvmCpuState s, ulong own)
    {
        CpuidEntry2[] entries = new CpuidEntry2[s.Cpuid.Length / 40];
        s.Cpuid.CopyTo(global::Vmm.Core.Interop.Ioctl.AsBytes<CpuidEntry2>(entries));
        uint supported = entries.FirstOrDefault(static e => e.Function == 0xd && e.Index == 0).Eax;
        bool hasYmm = (supported & 4) != 0;
        BinaryPrimitives.WriteUInt16LittleEndian(s.Xsave, 0x27f);
        BinaryPrimitives.WriteUInt32LittleEndian(s.Xsave.AsSpan(24), 0x1fa0);
        for (int i = 0; i < 32; i++) Put(s.Xsave, XmmOffset + i * 8, Mix * ((ulong)i + 100 + own));
        if (hasYmm)
            for (int i = 0; i < 32; i++) Put(s.Xsave, YmmOffset + i * 8, Mix * ((ulong)i + 200 + own));
        Put(s.Xsave, XstateBv, BinaryPrimitives.ReadUInt64LittleEndian(s.Xsave.AsSpan(XstateBv)) | (hasYmm ? 7u : 3u));
        if ((supported & 2) != 0) Put(s.Xcrs, 16, hasYmm ? 7u : 3u);
    }

    private static void Put(byte[] bytes, int offset, ulong value) => BinaryPrimitives.WriteUInt64LittleEndian(bytes.AsSpan(offset), value);
}
