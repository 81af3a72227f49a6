using Vmm.Core.Errors;
using Vmm.Core.RunStates;

namespace Vmm.Core.Devices;

/// <summary>
/// Keeps the state of a stopped VM still while somebody works on it without the BQL, as a snapshot does: calls that would change it wait. Thread-safe.
/// </summary>
/// <param name="bql">The VM's lock.</param>
internal sealed class StateHold(Bql bql)
{
    private readonly object _gate = new();
    private volatile bool _isHeld;

    /// <summary>Begins to hold. BQL: held.</summary>
    /// <returns>Dispose to let the calls go on; any thread.</returns>
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

    /// <summary>Takes the BQL for a change of the VM's state; waits for whoever holds it, who ends when the snapshot does.</summary>
    /// <exception cref="DeviceStateException">The state is held and the caller has the BQL, so that waiting would never end.</exception>
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
