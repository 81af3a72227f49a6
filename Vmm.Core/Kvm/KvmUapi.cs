using System.Runtime.InteropServices;

namespace Vmm.Core.Kvm;

/// <summary>
/// Structures of <c>&lt;linux/kvm.h&gt;</c> for x86-64. The C name is <c>kvm_</c> and our name in lower case with underscores; fields likewise. A
/// structure that the product only saves and loads as bytes is a size here. A test compares everything with a C compiler's layout.
/// </summary>
internal static partial class KvmUapi
{
    /// <summary>Sizes of the structures that are saved and loaded as bytes, by C name.</summary>
    internal static readonly (string C, int Bytes)[] OpaqueSizes =
    [
        ("kvm_xcrs", XcrsBytes), ("kvm_debugregs", DebugRegsBytes), ("kvm_lapic_state", LapicBytes), ("kvm_vcpu_events", VcpuEventsBytes),
        ("kvm_irqchip", IrqChipBytes), ("kvm_pit_state2", PitState2Bytes), ("kvm_xsave", XsaveBytes),
    ];

    /// <summary>Offsets in <c>struct kvm_run</c>, by C member.</summary>
    internal static readonly (string C, int Offset)[] RunOffsets =
    [
        ("immediate_exit", RunImmediateExit), ("exit_reason", RunExitReason), ("io.direction", RunUnion), ("io.size", RunIoSize), ("io.port", RunIoPort),
        ("io.count", RunIoCount), ("io.data_offset", RunIoDataOffset), ("mmio.phys_addr", RunUnion), ("mmio.data", RunMmioData), ("mmio.len", RunMmioLength),
        ("mmio.is_write", RunMmioIsWrite), ("fail_entry.hardware_entry_failure_reason", RunUnion), ("internal.suberror", RunUnion), ("system_event.type", RunUnion),
    ];

    internal const int XcrsBytes = 392, DebugRegsBytes = 128, LapicBytes = 1024, VcpuEventsBytes = 64, IrqChipBytes = 520, PitState2Bytes = 112, XsaveBytes = 4096;
    internal const int RunImmediateExit = 1, RunExitReason = 8, RunUnion = 32, RunIoSize = 33, RunIoPort = 34, RunIoCount = 36, RunIoDataOffset = 40,
        RunMmioData = 40, RunMmioLength = 48, RunMmioIsWrite = 52;

    [StructLayout(LayoutKind.Sequential)]
    internal struct UserspaceMemoryRegion
    {
        internal uint Slot;
        internal uint Flags;
        internal ulong GuestPhysAddr;
        internal ulong MemorySize;
        internal ulong UserspaceAddr;
    }

    [StructLayout(LayoutKind.Sequential, Size = 64)]
    internal struct PitConfig
    {
        internal uint Flags;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct IrqLevel
    {
        internal uint Irq;
        internal uint Level;
    }

    [StructLayout(LayoutKind.Sequential, Size = 32)]
    internal struct Irqfd
    {
        internal uint Fd;
        internal uint Gsi;
        internal uint Flags;
        internal uint Resamplefd;
    }

    [StructLayout(LayoutKind.Sequential, Size = 64)]
    internal struct Ioeventfd
    {
        internal ulong Datamatch;
        internal ulong Addr;
        internal uint Len;
        internal int Fd;
        internal uint Flags;
    }

    [StructLayout(LayoutKind.Sequential, Size = 32)]
    internal struct Msi
    {
        internal uint AddressLo;
        internal uint AddressHi;
        internal uint Data;
        internal uint Flags;
        internal uint Devid;
    }

    /// <summary>The union at its end holds chip and pin, or address and data of a message.</summary>
    [StructLayout(LayoutKind.Sequential, Size = 48)]
    internal struct IrqRoutingEntry
    {
        internal uint Gsi;
        internal uint Type;
        internal uint Flags;
        internal uint Pad;
        internal uint ReservedUnion0;
        internal uint ReservedUnion1;
        internal uint ReservedUnion2;
    }

    [StructLayout(LayoutKind.Sequential, Size = 48)]
    internal struct ClockData
    {
        internal ulong Clock;
        internal uint Flags;
        internal uint Pad0;
        internal ulong Realtime;
        internal ulong HostTsc;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct DirtyLog
    {
        internal uint Slot;
        internal uint Padding1;
        internal ulong DirtyBitmap;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct ClearDirtyLog
    {
        internal uint Slot;
        internal uint NumPages;
        internal ulong FirstPage;
        internal ulong DirtyBitmap;
    }

    [StructLayout(LayoutKind.Sequential, Size = 104)]
    internal struct EnableCap
    {
        internal uint Cap;
        internal uint Flags;
        internal ulong ReservedArgs0;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct DeviceAttr
    {
        internal uint Flags;
        internal uint Group;
        internal ulong Attr;
        internal ulong Addr;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct MpState
    {
        internal uint ReservedMpState;
    }

    [StructLayout(LayoutKind.Sequential, Size = 40)]
    internal struct CpuidEntry2
    {
        internal uint Function;
        internal uint Index;
        internal uint Flags;
        internal uint Eax;
        internal uint Ebx;
        internal uint Ecx;
        internal uint Edx;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct Regs
    {
        internal ulong Rax, Rbx, Rcx, Rdx, Rsi, Rdi, Rsp, Rbp;
        internal ulong R8, R9, R10, R11, R12, R13, R14, R15;
        internal ulong Rip, Rflags;
    }

    [StructLayout(LayoutKind.Sequential)]
    internal struct Segment
    {
        internal ulong Base;
        internal uint Limit;
        internal ushort Selector;
        internal byte Type;
        internal byte Present, Dpl, Db, S, L, G, Avl;
        internal byte Unusable;
        internal byte Padding;
    }

    [StructLayout(LayoutKind.Sequential, Size = 16)]
    internal struct Dtable
    {
        internal ulong Base;
        internal ushort Limit;
    }

    [StructLayout(LayoutKind.Sequential, Size = 312)]
    internal struct Sregs
    {
        internal Segment Cs, Ds, Es, Fs, Gs, Ss;
        internal Segment Tr, Ldt;
        internal Dtable Gdt, Idt;
        internal ulong Cr0, Cr2, Cr3, Cr4, Cr8;
        internal ulong Efer;
        internal ulong ApicBase;
    }
}
