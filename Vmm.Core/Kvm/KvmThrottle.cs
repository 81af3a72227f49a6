using Vmm.Core.RunStates;

namespace Vmm.Core.Kvm;

/// <summary>Puts a VM's vCPUs to sleep in every time slice while the guest is throttled (QEMU: <c>cpu_throttle_timer_tick</c>). Dispose it before the vCPUs.</summary>
internal sealed class KvmThrottle : IDisposable
{
    private readonly CpuThrottle _throttle;
    private readonly IReadOnlyList<KvmVcpu> _vcpus;
    private readonly Lock _gate = new();
    private readonly Timer _timer;
    private readonly IDisposable _registration;
    private ThrottleDebt _debt;
    private bool _isActive;

    internal KvmThrottle(CpuThrottle throttle, IReadOnlyList<KvmVcpu> vcpus)
    {
        (_throttle, _vcpus) = (throttle, vcpus);
        _timer = new Timer(_ => Tick(), null, Timeout.Infinite, Timeout.Infinite);
        _registration = throttle.OnChange(OnChange);
    }

    /// <summary>Ends all sleeps, and waits for a tick that is going on.</summary>
    public void Dispose()
    {
        _registration.Dispose();
        _timer.DisposeAsync().AsTask().GetAwaiter().GetResult();
        foreach (KvmVcpu vcpu in _vcpus) vcpu.Sleep(0);
    }

    private void OnChange()
    {
        lock (_gate)
        {
            bool wasActive = _isActive;
            _isActive = _throttle.Percent > 0;
            if (_isActive && !wasActive) Tick();
            if (_isActive) return;
            foreach (KvmVcpu vcpu in _vcpus) vcpu.Sleep(0);
        }
    }

    private void Tick()
    {
        lock (_gate)
        {
            if (!_isActive) return;
            double sleepMs = CpuThrottle.SleepMs(_throttle.Percent);
            foreach (KvmVcpu vcpu in _vcpus) vcpu.Sleep(sleepMs);
            int dueMs = _debt.Begin(CpuThrottle.RunMs + sleepMs);
            _debt.End(dueMs);
            _timer.Change(dueMs, Timeout.Infinite);
        }
    }
}
