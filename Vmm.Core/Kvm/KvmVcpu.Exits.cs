using System.Buffers.Binary;
using System.Globalization;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

// Handling of the exits from the guest.
internal sealed partial class KvmVcpu
{
    private uint ExitReason => BinaryPrimitives.ReadUInt32LittleEndian(Run(RunExitReason, 4));

    /// <summary>Handles an exit. Returns false if the vCPU must not enter the guest again until the next start.</summary>
    private bool HandleExit()
    {
        Volatile.Write(ref _exits, _exits + 1);
        _pendingIo = false;
        switch (ExitReason)
        {
            case KVM_EXIT_IO:
            case KVM_EXIT_MMIO:
                _pendingIo = true;
                Access();
                return true;
            case KVM_EXIT_INTR:
            case KVM_EXIT_HLT:
                // With in-kernel interrupt controllers a halted vCPU sleeps in the kernel, so this exit only asks for another KVM_RUN.
                return true;
            case KVM_EXIT_DIRTY_RING_FULL:
                _host.OnDirtyRingFull();
                return true;
            case KVM_EXIT_SHUTDOWN:
            case KVM_EXIT_SYSTEM_EVENT:
                _stop = true;
                _host.OnVcpuStopped(this, null);
                return false;
            default:
                Fail(new KvmException(DescribeExit(), Errno.EIO));
                return false;
        }
    }

    private void Fail(KvmException error)
    {
        _stop = true;
        _host.OnVcpuStopped(this, error);
    }

    private void Access()
    {
        while (!_host.Bql.TryEnter(s_bqlPoll))
        {
            if (!_stop) continue;
            // The thread that waits for this vCPU to park may hold the BQL; that thread then does the access.
            lock (_gate)
            {
                _phase = Phase.NeedsService;
                Monitor.PulseAll(_gate);
                while (_phase == Phase.NeedsService) Monitor.Wait(_gate);
            }
            return;
        }
        try
        {
            Dispatch();
        }
        finally
        {
            _host.Bql.Exit();
        }
    }

    /// <summary>Does the access that caused the exit. BQL: held.</summary>
    private void Dispatch()
    {
        try
        {
            if (ExitReason == KVM_EXIT_MMIO) DispatchMmio();
            else DispatchIo();
        }
        catch (VmmException e)
        {
            // A failing device must not end the process; the guest stops, and the error names the device.
            Fail(new KvmException($"vCPU {Index}: an access failed: {e.Message}", e.Errno, e));
        }
    }

    private void DispatchMmio()
    {
        var address = new GuestAddress(BinaryPrimitives.ReadUInt64LittleEndian(Run(RunUnion, 8)));
        int length = BinaryPrimitives.ReadInt32LittleEndian(Run(RunMmioLength, 4));
        bool isWrite = Run(RunMmioIsWrite, 1)[0] != 0;
        Span<byte> data = Run(RunMmioData, 8);
        // The kernel splits accesses at pages, so any length may arrive; it is split into powers of two here.
        for (int at = 0; at < length;)
        {
            int size = 1 << (31 - int.LeadingZeroCount(Math.Min(8, length - at)));
            if (isWrite) _host.Io.MmioWrite(address + (ulong)at, size, Load(data.Slice(at, size)));
            else Store(data.Slice(at, size), _host.Io.MmioRead(address + (ulong)at, size));
            at += size;
        }
    }

    private void DispatchIo()
    {
        bool isOut = Run(RunUnion, 1)[0] == KVM_EXIT_IO_OUT;
        int size = Run(RunIoSize, 1)[0];
        ushort port = BinaryPrimitives.ReadUInt16LittleEndian(Run(RunIoPort, 2));
        int count = BinaryPrimitives.ReadInt32LittleEndian(Run(RunIoCount, 4));
        ulong offset = BinaryPrimitives.ReadUInt64LittleEndian(Run(RunIoDataOffset, 8));
        Span<byte> data = Run(offset, size * count);
        for (int i = 0; i < count; i++)
        {
            Span<byte> one = data.Slice(i * size, size);
            if (isOut) _host.Io.PioWrite(port, size, (uint)Load(one));
            else Store(one, _host.Io.PioRead(port, size));
        }
    }

    private static ulong Load(ReadOnlySpan<byte> from)
    {
        ulong value = 0;
        for (int i = from.Length - 1; i >= 0; i--) value = value << 8 | from[i];
        return value;
    }

    private static void Store(Span<byte> to, ulong value)
    {
        for (int i = 0; i < to.Length; i++) to[i] = (byte)(value >> 8 * i);
    }

    private string DescribeExit()
    {
        ulong Word(ulong at) => BinaryPrimitives.ReadUInt64LittleEndian(Run(at, 8));
        Regs regs = GetRegs();
        string where = string.Create(CultureInfo.InvariantCulture, $"vCPU {Index} at rip 0x{regs.Rip:x}");
        return ExitReason switch
        {
            KVM_EXIT_FAIL_ENTRY => $"{where}: the processor refused to enter the guest (KVM_EXIT_FAIL_ENTRY, reason 0x{Word(RunUnion):x})",
            KVM_EXIT_INTERNAL_ERROR => $"{where}: KVM cannot go on (KVM_EXIT_INTERNAL_ERROR, suberror {BinaryPrimitives.ReadUInt32LittleEndian(Run(RunUnion, 4))})",
            uint other => $"{where}: exit reason {other} is not known",
        };
    }

    /// <summary>Tells a guest with kvm-clock that it was paused, so that its watchdogs do not fire. Call it before a start.</summary>
    internal void TellPaused()
    {
        // EINVAL: the guest does not use kvm-clock.
        if (Ioctl.Invoke(_fd, KVM_KVMCLOCK_CTRL, 0, out Errno errno) < 0 && errno != Errno.EINVAL) throw KvmSystem.Failed($"vCPU {Index}: KVM_KVMCLOCK_CTRL", errno);
    }

    internal Regs GetRegs()
    {
        var regs = default(Regs);
        Set(KVM_GET_REGS, Ioctl.AsBytes(ref regs), "KVM_GET_REGS");
        return regs;
    }

    internal void SetRegs(Regs regs) => Set(KVM_SET_REGS, Ioctl.AsBytes(ref regs), "KVM_SET_REGS");

    internal Sregs GetSregs()
    {
        var sregs = default(Sregs);
        Set(KVM_GET_SREGS, Ioctl.AsBytes(ref sregs), "KVM_GET_SREGS");
        return sregs;
    }

    internal void SetSregs(Sregs sregs) => Set(KVM_SET_SREGS, Ioctl.AsBytes(ref sregs), "KVM_SET_SREGS");

    internal void Set(uint request, Span<byte> argument, string what)
    {
        if (Ioctl.Invoke(_fd, request, argument, out Errno errno) < 0) throw KvmSystem.Failed($"vCPU {Index}: {what}", errno);
    }
}
