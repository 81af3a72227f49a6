using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.VmStates;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>
/// The migrated state of one vCPU, section <c>kvm-cpu</c>: the kernel's own structures, little-endian, whose layout is a stable ABI. The CPUID comes
/// first, so that a load on a host with fewer features fails before it changes anything. BQL held and vCPU parked for every call.
/// </summary>
internal sealed class KvmCpuState
{
    internal const uint MsrTsc = 0x10, MsrTscDeadline = 0x6e, MsrWallClock = 0x11, MsrWallClockNew = 0x4b564d00;
    private const int MaxCpuidBytes = 256 * 40, MaxXsaveBytes = 64 << 10, MaxMsrs = 1024;

    internal static VmStateDescription<KvmCpuState> Description { get; } = new()
    {
        Name = "kvm-cpu",
        Fields =
        [
            VmState.UInt32<KvmCpuState>("cpuid_bytes", static s => ref s.CpuidBytes),
            VmState.VBufferAlloc<KvmCpuState>("cpuid", static s => s.CpuidBytes, MaxCpuidBytes, static s => ref s.Cpuid),
            VmState.UInt32<KvmCpuState>("tsc_khz", static s => ref s.TscKhz),
            VmState.UInt64<KvmCpuState>("tsc", static s => ref s.Tsc),
            VmState.UInt32<KvmCpuState>("mp_state", static s => ref s.MpState),
            VmState.Buffer<KvmCpuState>("regs", 144, static s => s.Regs),
            VmState.Buffer<KvmCpuState>("sregs", 312, static s => s.Sregs),
            VmState.UInt32<KvmCpuState>("xsave_bytes", static s => ref s.XsaveLength),
            VmState.VBufferAlloc<KvmCpuState>("xsave", static s => s.XsaveLength, MaxXsaveBytes, static s => ref s.Xsave),
            VmState.Buffer<KvmCpuState>("xcrs", XcrsBytes, static s => s.Xcrs),
            VmState.UInt32<KvmCpuState>("msr_count", static s => ref s.MsrCount),
            VmState.VarArrayAlloc<KvmCpuState, uint>("msr_index", VmStateTypes.UInt32, static s => s.MsrCount, MaxMsrs, static s => ref s.MsrIndex),
            VmState.VarArrayAlloc<KvmCpuState, ulong>("msr_data", VmStateTypes.UInt64, static s => s.MsrCount, MaxMsrs, static s => ref s.MsrData),
            VmState.Buffer<KvmCpuState>("debugregs", DebugRegsBytes, static s => s.DebugRegs),
            VmState.Buffer<KvmCpuState>("lapic", LapicBytes, static s => s.Lapic),
            VmState.Buffer<KvmCpuState>("vcpu_events", VcpuEventsBytes, static s => s.VcpuEvents),
        ],
        PreSave = static s => s.Save(),
        PostLoad = static (s, _) => s.Load(),
    };

    // What migrates.
    internal uint CpuidBytes, TscKhz, MpState, XsaveLength, MsrCount;
    internal ulong Tsc;
    internal byte[] Cpuid = [], Xsave = [];
    internal uint[] MsrIndex = [];
    internal ulong[] MsrData = [];
    internal readonly byte[] Regs = new byte[144], Sregs = new byte[312], Xcrs = new byte[XcrsBytes], DebugRegs = new byte[DebugRegsBytes],
        Lapic = new byte[LapicBytes], VcpuEvents = new byte[VcpuEventsBytes];

    private readonly KvmVcpu _vcpu;
    private readonly KvmClock _clock;
    private readonly uint[] _msrs;
    private readonly CpuidEntry2[] _ours; // The CPUID that this host supports.
    private CpuidEntry2[] _shown; // The CPUID that the guest sees: has fewer features if the guest comes from a host with fewer.
    private readonly int _xsaveBytes;

    /// <summary>Gives the vCPU the host's CPUID and finds out which MSRs it has. The vCPU has not run yet.</summary>
    internal KvmCpuState(KvmVcpu vcpu, int cpus, KvmVm vm, KvmClock clock)
    {
        (_vcpu, _clock) = (vcpu, clock);
        _ours = KvmCpuid.For(vcpu.Index, cpus, vm.System);
        _shown = _ours;
        if (SetCpuid(_ours) is not Errno.None and var refused) throw KvmSystem.Failed($"vCPU {vcpu.Index}: KVM_SET_CPUID2", refused);
        _xsaveBytes = Math.Max(XsaveBytes, vm.System.Extension(KVM_CAP_XSAVE2));
        TscKhz = (uint)Math.Max(0, Ioctl.Invoke(vcpu.Fd, KVM_GET_TSC_KHZ, 0, out _));
        clock.Add(vcpu, this);
        // The list names the MSRs that the kernel knows. Only a try shows whether this vCPU has an MSR and accepts its value again.
        _msrs = [.. vm.System.MsrIndices.Where(static m => m is not MsrTsc).Append(MsrTscDeadline).Distinct().Where(m => TryReadMsr(m, out ulong value) && TryWriteMsr(m, value))];
    }

    /// <summary>Reads the state from the vCPU (QEMU: <c>kvm_arch_get_registers</c>).</summary>
    internal void Save()
    {
        Cpuid = Ioctl.AsBytes<CpuidEntry2>(_shown.AsSpan()).ToArray();
        CpuidBytes = (uint)Cpuid.Length;
        Span<byte> state = stackalloc byte[4];
        // First, because this read makes the kernel process a pending INIT and SIPI, which change the other registers.
        _vcpu.Set(KVM_GET_MP_STATE, state, "KVM_GET_MP_STATE");
        MpState = BinaryPrimitives.ReadUInt32LittleEndian(state);
        _vcpu.Set(KVM_GET_REGS, Regs, "KVM_GET_REGS");
        _vcpu.Set(KVM_GET_SREGS, Sregs, "KVM_GET_SREGS");
        Xsave = new byte[_xsaveBytes];
        XsaveLength = (uint)_xsaveBytes;
        if (_xsaveBytes > XsaveBytes) _vcpu.Set(KVM_GET_XSAVE2, Xsave, "KVM_GET_XSAVE2");
        else _vcpu.Set(KVM_GET_XSAVE, Xsave, "KVM_GET_XSAVE");
        _vcpu.Set(KVM_GET_XCRS, Xcrs, "KVM_GET_XCRS");
        MsrIndex = _msrs;
        MsrCount = (uint)_msrs.Length;
        MsrData = [.. _msrs.Select(m => TryReadMsr(m, out ulong value) ? value : throw new KvmException($"vCPU {_vcpu.Index}: MSR 0x{m:x} cannot be read", Errno.EIO))];
        Tsc = _clock.TscAtClock(_vcpu) ?? (TryReadMsr(MsrTsc, out ulong tsc) ? tsc : 0);
        _vcpu.Set(KVM_GET_DEBUGREGS, DebugRegs, "KVM_GET_DEBUGREGS");
        _vcpu.Set(KVM_GET_LAPIC, Lapic, "KVM_GET_LAPIC");
        _vcpu.Set(KVM_GET_VCPU_EVENTS, VcpuEvents, "KVM_GET_VCPU_EVENTS");
    }

    /// <summary>
    /// Writes the state to the vCPU. The order matters: sregs hold the APIC's base, XCR0 decides what XSAVE may hold, the deadline needs the APIC's mode.
    /// </summary>
    /// <exception cref="IncompatibleStateException">This host's CPU lacks something that the state needs; nothing has changed.</exception>
    internal void Load()
    {
        if (CpuidBytes % 40 != 0) throw new IncompatibleStateException($"vCPU {_vcpu.Index}: a CPUID of {CpuidBytes} bytes is not a whole number of entries");
        var theirs = new CpuidEntry2[CpuidBytes / 40];
        Cpuid.CopyTo(Ioctl.AsBytes<CpuidEntry2>(theirs));
        KvmCpuid.CheckSubset(_vcpu.Index, theirs, _ours);
        uint[] unknown = [.. MsrIndex.Except(_msrs)];
        if (unknown.Length > 0)
            throw new IncompatibleStateException($"vCPU {_vcpu.Index}: this host does not know MSR {string.Join(", ", unknown.Select(static m => $"0x{m:x}"))}");
        if (XsaveLength > _xsaveBytes)
            throw new IncompatibleStateException($"vCPU {_vcpu.Index}: {XsaveLength} bytes of extended state exceed this host's {_xsaveBytes}");
        if (!theirs.AsSpan().SequenceEqual(_shown) && SetCpuid(theirs) is not Errno.None and var refused)
        {
            throw new IncompatibleStateException($"vCPU {_vcpu.Index}: KVM_SET_CPUID2: {Posix.Describe(refused)}")
            {
                Hint = "KVM cannot change the CPU of a guest that has run; load this state in a new process",
            };
        }
        _shown = theirs;
        _vcpu.Set(KVM_SET_SREGS, Sregs, "KVM_SET_SREGS");
        _vcpu.Set(KVM_SET_LAPIC, Lapic, "KVM_SET_LAPIC");
        _vcpu.Set(KVM_SET_REGS, Regs, "KVM_SET_REGS");
        _vcpu.Set(KVM_SET_XCRS, Xcrs, "KVM_SET_XCRS");
        byte[] xsave = new byte[_xsaveBytes];
        Xsave.CopyTo(xsave, 0);
        _vcpu.Set(KVM_SET_XSAVE, xsave, "KVM_SET_XSAVE");
        _clock.SetTsc(_vcpu, this);
        for (int i = 0; i < MsrCount; i++) LoadMsr(MsrIndex[i], MsrData[i]);
        _vcpu.Set(KVM_SET_DEBUGREGS, DebugRegs, "KVM_SET_DEBUGREGS");
        _vcpu.Set(KVM_SET_VCPU_EVENTS, VcpuEvents, "KVM_SET_VCPU_EVENTS");
        Span<byte> state = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(state, MpState);
        _vcpu.Set(KVM_SET_MP_STATE, state, "KVM_SET_MP_STATE");
    }

    internal bool TryReadMsr(uint index, out ulong value)
    {
        bool ok = Msr(KVM_GET_MSRS, index, 0, out value);
        return ok;
    }

    internal bool TryWriteMsr(uint index, ulong value) => Msr(KVM_SET_MSRS, index, value, out _);

    private void LoadMsr(uint index, ulong value)
    {
        // A write makes the kernel fill the guest's page again. Zero means that the guest never registered a page.
        if (index is MsrWallClock or MsrWallClockNew && value == 0) return;
        if (!TryWriteMsr(index, value)) throw new IncompatibleStateException($"vCPU {_vcpu.Index}: this host refuses 0x{value:x} for MSR 0x{index:x}");
    }

    private bool Msr(uint request, uint index, ulong data, out ulong value)
    {
        Span<byte> argument = stackalloc byte[24];
        argument.Clear();
        argument[0] = 1;
        BinaryPrimitives.WriteUInt32LittleEndian(argument[8..], index);
        BinaryPrimitives.WriteUInt64LittleEndian(argument[16..], data);
        int done = Ioctl.Invoke(_vcpu.Fd, request, argument, out _);
        value = BinaryPrimitives.ReadUInt64LittleEndian(argument[16..]);
        return done == 1;
    }

    private Errno SetCpuid(CpuidEntry2[] entries)
    {
        byte[] argument = new byte[8 + entries.Length * 40];
        BinaryPrimitives.WriteInt32LittleEndian(argument, entries.Length);
        Ioctl.AsBytes<CpuidEntry2>(entries).CopyTo(argument.AsSpan(8));
        return Ioctl.Invoke(_vcpu.Fd, KVM_SET_CPUID2, argument, out Errno errno) >= 0 ? Errno.None : errno;
    }
}
