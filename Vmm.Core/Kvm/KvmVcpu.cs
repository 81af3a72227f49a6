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

/// <summary>
/// What a vCPU needs from the machine. Called on the vCPU's thread, or on the thread that stops the vCPU.
/// </summary>
internal interface IKvmVcpuHost
{
    /// <summary>The VM's big lock; the vCPU takes it for every access to a device.</summary>
    RunStates.Bql Bql { get; }

    /// <summary>The bus that answers accesses. BQL: held.</summary>
    IoBus Io { get; }

    /// <summary>The vCPU stopped by itself and waits for the next start. BQL: not held.</summary>
    /// <param name="vcpu">The vCPU that stopped.</param>
    /// <param name="error">The reason; null if the guest asked for a reset (triple fault).</param>
    void OnVcpuStopped(KvmVcpu vcpu, KvmException? error);

    /// <summary>A vCPU's dirty ring is full; the vCPU cannot go on until its entries are taken. BQL: not held.</summary>
    void OnDirtyRingFull();
}

/// <summary>
/// One vCPU with a thread of its own. The thread runs the guest between <see cref="Start"/> and <see cref="RequestStop"/>; otherwise it is parked, and
/// any thread may read the vCPU's state. A thread that stops vCPUs usually holds the BQL, which the guest's present access may need. The vCPU then
/// leaves the access to the stopping thread (<see cref="WaitParked"/>), so that a save never finds an unfinished access.
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
    private RealtimeBoost? _boost; // Set from the stop request until the vCPU is parked. BQL.

    private enum Phase { Starting, Parked, Running, NeedsService }

    /// <summary>Makes the vCPU and its thread; the vCPU is parked.</summary>
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
        // The thread could not set its signal mask and has ended.
        if (_thread.IsFaulted) { Dispose(); _thread.WaitAndUnwrapException(); }
    }

    /// <summary>Number of the vCPU, from 0; also its APIC id.</summary>
    internal int Index { get; }

    /// <summary>Number of exits to this process so far.</summary>
    internal long Exits => Volatile.Read(ref _exits);

    /// <summary>Number of kicks that the thread noticed; kicks that it notices together count once.</summary>
    internal long Kicks => Volatile.Read(ref _kicks);

    /// <summary>Time at which the thread entered the guest after the last start, by <see cref="Stopwatch"/>; 0 before the first start.</summary>
    internal long EnteredAt => Volatile.Read(ref _enteredAt);

    /// <summary>Time at which the thread last left the guest, by <see cref="Stopwatch"/>; 0 before the first time.</summary>
    internal long LeftAt => Volatile.Read(ref _leftAt);

    /// <summary>True while the thread is not parked.</summary>
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

    /// <summary>Mapping of the dirty ring, or null.</summary>
    internal MappedRegion? Ring { get; }

    /// <summary>Makes the thread run the guest. The vCPU must be parked.</summary>
    internal void Start()
    {
        lock (_gate)
        {
            _stop = false;
            _sleepMs = 0;
            Run(RunImmediateExit, 1)[0] = 0;
            _go = true;
            Monitor.PulseAll(_gate);
        }
    }

    /// <summary>Waits after <see cref="Start"/> until the thread enters the guest, so that a VM in state running does run.</summary>
    internal void WaitEntered()
    {
        lock (_gate)
        {
            while (_go && !_thread.IsCompleted) Monitor.Wait(_gate, s_bqlPoll);
        }
    }

    /// <summary>Requests that the vCPU parks, without waiting. BQL: held.</summary>
    internal void RequestStop()
    {
        _stop = true;
        // A thread in the guest takes a signal only when the host schedules it.
        _boost ??= RealtimeBoost.Raise(Volatile.Read(ref _threadId));
        Kick();
        // A throttled one sleeps outside the guest.
        lock (_gate) Monitor.PulseAll(_gate);
    }

    /// <summary>Waits until the vCPU is parked, and does the accesses that it leaves to this thread. BQL: held; call <see cref="RequestStop"/> first.</summary>
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

    /// <summary>Makes the vCPU leave the guest soon. It enters the guest again unless a stop was requested. Any thread.</summary>
    internal void Kick()
    {
        Volatile.Write(ref Run(RunImmediateExit, 1)[0], 1);
        // Sending fails if the thread has ended; then there is nothing to interrupt.
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

    /// <summary>Returns part of <c>struct kvm_run</c>.</summary>
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
                // Order: drain the signal, clear the flag, read the stop request. Kick uses the reverse order, so no request is lost.
                KickSignal.Drain();
                Volatile.Write(ref Run(RunImmediateExit, 1)[0], 0);
                Thread.MemoryBarrier();
                Volatile.Write(ref _kicks, _kicks + 1);
                SleepIfAsked();
                continue;
            }
            if (!HandleExit()) return;
        }
        FinishAccess();
    }

    /// <summary>
    /// Completes the last access: the kernel moves the instruction pointer only in the next KVM_RUN, which returns here without running guest code.
    /// </summary>
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
