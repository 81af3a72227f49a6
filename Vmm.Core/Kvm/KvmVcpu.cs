using System.Buffers.Binary;
using System.Diagnostics;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.Threading;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;
using Nito.AsyncEx.Synchronous;

/// <summary>What a vCPU asks of the machine when it cannot go on by itself. Called on the vCPU's thread or on that of whoever stops it.</summary>
internal interface IKvmVcpuHost
{
    /// <summary>The VM's big lock; taken around every access to a device.</summary>
    RunStates.Bql Bql { get; }

    /// <summary>Where accesses go. BQL: held.</summary>
    IoBus Io { get; }

    /// <summary>The vCPU stopped by itself; it waits for the next start. BQL: not held.</summary>
    /// <param name="vcpu">The vCPU.</param>
    /// <param name="error">Why; null for a reset that the guest asked for (triple fault).</param>
    void OnVcpuStopped(KvmVcpu vcpu, KvmException? error);

    /// <summary>A vCPU's dirty ring is full: it cannot go on until entries were taken. BQL: not held.</summary>
    void OnDirtyRingFull();
}

/// <summary>
/// One vCPU with a thread of its own. The thread runs the guest between <see cref="Start"/> and <see cref="RequestStop"/>, else it is parked and
/// any thread may look at the vCPU's state. Whoever stops vCPUs usually holds the BQL, and the guest may be in the middle of an access that needs
/// it: the vCPU then hands the access over to the one who waits (<see cref="WaitParked"/>), so that no half-done access is ever saved.
/// </summary>
internal sealed partial class KvmVcpu : IDisposable
{
    private static readonly TimeSpan s_bqlPoll = TimeSpan.FromMilliseconds(1);

    private readonly KvmVm _vm;
    private readonly IKvmVcpuHost _host;
    private readonly OwnedFd _fd;
    private readonly MappedRegion _run;
    private readonly object _gate = new();
    private readonly Task _thread;
    private Phase _phase = Phase.Starting;
    private bool _go, _end;
    private int _threadId;
    private volatile bool _stop = true;
    private bool _pendingIo;
    private long _exits, _kicks, _enteredAt, _leftAt;
    private RealtimeBoost? _boost; // From the request to stop until it is parked. BQL.

    private enum Phase { Starting, Parked, Running, NeedsService }

    /// <summary>Makes the vCPU and its thread, parked.</summary>
    /// <exception cref="KvmException">The kernel refused.</exception>
    internal KvmVcpu(KvmVm vm, int index, IKvmVcpuHost host)
    {
        (_vm, Index, _host) = (vm, index, host);
        _fd = vm.CreateVcpu(index);
        try
        {
            _run = MappedRegion.Map(_fd, (ulong)vm.System.RunBytes, shared: true, 0, $"vCPU {index}");
            if (vm.DirtyRingEntries > 0)
                Ring = MappedRegion.Map(_fd, (ulong)vm.DirtyRingEntries * KvmDirtyRings.EntryBytes, shared: true, KVM_DIRTY_LOG_PAGE_OFFSET * RamBlock.PageSize, $"dirty ring of vCPU {index}");
        }
        catch
        {
            _run?.Dispose();
            _fd.Dispose();
            throw;
        }
        _thread = WorkerThread.Run($"kvm-vcpu-{index}", RunThread);
        lock (_gate)
        {
            while (_phase == Phase.Starting) Monitor.Wait(_gate);
        }
        // The signal mask could not be set: the body ended at once.
        if (_thread.IsFaulted) { Dispose(); _thread.WaitAndUnwrapException(); }
    }

    /// <summary>Number, from 0; also the APIC id.</summary>
    internal int Index { get; }

    /// <summary>Exits to this process so far.</summary>
    internal long Exits => Volatile.Read(ref _exits);

    /// <summary>Kicks that were noticed; several before one look count once.</summary>
    internal long Kicks => Volatile.Read(ref _kicks);

    /// <summary>When the thread went to run the guest after the last start, by <see cref="Stopwatch"/>; 0 before the first.</summary>
    internal long EnteredAt => Volatile.Read(ref _enteredAt);

    /// <summary>When the thread left the guest last, by <see cref="Stopwatch"/>; 0 before the first time.</summary>
    internal long LeftAt => Volatile.Read(ref _leftAt);

    /// <summary>Whether the thread is out of its parking place.</summary>
    internal bool IsRunning
    {
        get
        {
            lock (_gate) return _phase == Phase.Running;
        }
    }

    internal OwnedFd Fd => _fd;

    /// <summary>The kernel's id of the thread.</summary>
    internal int ThreadId => Volatile.Read(ref _threadId);

    /// <summary>The dirty ring, or null.</summary>
    internal MappedRegion? Ring { get; }

    /// <summary>Lets the guest run. The vCPU must be parked.</summary>
    internal void Start()
    {
        lock (_gate)
        {
            _stop = false;
            Run(RunImmediateExit, 1)[0] = 0;
            _go = true;
            Monitor.PulseAll(_gate);
        }
    }

    /// <summary>Waits until the thread goes to run the guest, after <see cref="Start"/>: a VM that is said to run does.</summary>
    internal void WaitEntered()
    {
        lock (_gate)
        {
            while (_go && !_thread.IsCompleted) Monitor.Wait(_gate, s_bqlPoll);
        }
    }

    /// <summary>Asks the vCPU to park, and does not wait. BQL: held.</summary>
    internal void RequestStop()
    {
        _stop = true;
        // A thread that spins in the guest notices a signal only when the host lets it run.
        _boost ??= RealtimeBoost.Raise(Volatile.Read(ref _threadId));
        Kick();
    }

    /// <summary>Waits until the vCPU is parked, and does its accesses meanwhile. BQL: held, after <see cref="RequestStop"/>.</summary>
    internal void WaitParked()
    {
        try
        {
            Wait();
        }
        finally
        {
            _boost?.Lower();
            _boost = null;
        }
    }

    private void Wait()
    {
        while (true)
        {
            lock (_gate)
            {
                _go = false;
                while (_phase == Phase.Running) Monitor.Wait(_gate);
                if (_phase == Phase.Parked) return;
            }
            Dispatch();
            lock (_gate)
            {
                _phase = Phase.Running;
                Monitor.PulseAll(_gate);
            }
        }
    }

    /// <summary>Makes the vCPU leave the guest soon, whatever it does. It goes on by itself unless a stop was requested. Any thread.</summary>
    internal void Kick()
    {
        Volatile.Write(ref Run(RunImmediateExit, 1)[0], 1);
        // A signal to a thread that has ended is no loss: there is nothing left to interrupt.
        KickSignal.Send(Volatile.Read(ref _threadId));
    }

    /// <summary>Ends the thread and closes the vCPU, which must be parked.</summary>
    public void Dispose()
    {
        lock (_gate)
        {
            _end = true;
            Monitor.PulseAll(_gate);
        }
        _thread.WaitWithoutException();
        Ring?.Dispose();
        _run.Dispose();
        _fd.Dispose();
    }

    /// <summary>Part of the structure shared with the kernel.</summary>
    private Span<byte> Run(ulong offset, int length) => _run.Slice(offset, length);

    private void RunThread()
    {
        try
        {
            Volatile.Write(ref _threadId, KickSignal.Block(out ulong callMask));
            byte[] mask = new byte[12];
            mask[0] = 8;
            BinaryPrimitives.WriteUInt64LittleEndian(mask.AsSpan(4), callMask);
            Set(KVM_SET_SIGNAL_MASK, mask, "KVM_SET_SIGNAL_MASK");
            while (WaitForStart())
            {
                try
                {
                    RunUntilStop();
                }
                catch (VmmException e)
                {
                    Fail(new KvmException($"vCPU {Index}: {e.Message}", e.Errno, e));
                }
            }
        }
        finally
        {
            lock (_gate)
            {
                _phase = Phase.Parked;
                Monitor.PulseAll(_gate);
            }
        }
    }

    private bool WaitForStart()
    {
        lock (_gate)
        {
            _phase = Phase.Parked;
            Monitor.PulseAll(_gate);
            while (!_go && !_end) Monitor.Wait(_gate);
            if (_end) return false;
            _go = false;
            _phase = Phase.Running;
            Volatile.Write(ref _enteredAt, Stopwatch.GetTimestamp());
            Monitor.PulseAll(_gate);
            return true;
        }
    }

    private void RunUntilStop()
    {
        while (!_stop)
        {
            int result = Ioctl.InvokeOnce(_fd, KVM_RUN, out Errno errno);
            Volatile.Write(ref _leftAt, Stopwatch.GetTimestamp());
            if (result < 0)
            {
                if (errno is not (Errno.EINTR or Errno.EAGAIN)) { Fail(new KvmException($"vCPU {Index}: KVM_RUN: {Posix.Describe(errno)}", errno)); return; }
                // Drained before the flag is cleared and the flag before the request is read: whoever kicks does it the other way round.
                KickSignal.Drain();
                Volatile.Write(ref Run(RunImmediateExit, 1)[0], 0);
                Thread.MemoryBarrier();
                Volatile.Write(ref _kicks, _kicks + 1);
                continue;
            }
            if (!HandleExit()) return;
        }
        FinishAccess();
    }

    /// <summary>An access is done when the kernel has been told: it runs no guest code now, but moves the instruction pointer.</summary>
    private void FinishAccess()
    {
        while (_pendingIo)
        {
            Volatile.Write(ref Run(RunImmediateExit, 1)[0], 1);
            int result = Ioctl.InvokeOnce(_fd, KVM_RUN, out Errno errno);
            if (result < 0) _pendingIo = false;
            if (result < 0 && errno is not (Errno.EINTR or Errno.EAGAIN)) Fail(new KvmException($"vCPU {Index}: KVM_RUN: {Posix.Describe(errno)}", errno));
            else if (result >= 0 && !HandleExit()) return;
        }
        KickSignal.Drain();
    }
}
