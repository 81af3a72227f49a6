using Vmm.Core.Errors;
using Vmm.Core.RunStates;

namespace Vmm.Core.Devices;

/// <summary>
/// Freezes the state of a stopped VM for a thread that works on it without the BQL, as a snapshot does. Calls that would change it wait. Thread-safe.
/// </summary>
internal sealed class StateHold(Bql bql)
{
    private readonly object _gate = new();
    private volatile bool _isHeld;

    /// <summary>Freezes the state. BQL: held.</summary>
    /// <returns>Dispose on any thread to release it.</returns>
    internal IDisposable Take()
    {
        bql.AssertHeld();
        if (_isHeld) throw new InvalidOperationException("the VM's state is held already");
        _isHeld = true;
        return new Registration(() =>
        {
            lock (_gate)
            {
                _isHeld = false;
                Monitor.PulseAll(_gate);
            }
        });
    }

    /// <summary>Takes the BQL for a change of the VM's state; first waits until the state is released.</summary>
    /// <exception cref="DeviceStateException">The state is frozen and the caller holds the BQL, so the wait would never end.</exception>
    internal Lock.Scope Acquire()
    {
        while (true)
        {
            if (_isHeld && bql.IsHeld) throw new DeviceStateException("a snapshot of the VM is being saved or loaded");
            lock (_gate)
                while (_isHeld) Monitor.Wait(_gate);
            Lock.Scope scope = bql.Acquire();
            if (!_isHeld) return scope;
            scope.Dispose();
        }
    }
}
