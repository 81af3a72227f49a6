using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>
/// What a device's own threads pass before they touch guest memory, so that <see cref="IVfioUserBackend.Quiesce"/> has something to close
/// (vfio-user 7). Thread-safe. Nobody holds a lock inside that a register access or a state change needs.
/// </summary>
public sealed class VfioUserDmaGate : IDisposable
{
    private readonly object _gate = new();
    private TaskCompletionSource<Errno>? _empty;
    private int _closed, _inside;
    private bool _disposed;

    /// <summary>Goes in, after a wait while the gate is closed.</summary>
    /// <returns>False: the device is being taken apart, and nothing may be touched any more.</returns>
    public bool Enter()
    {
        lock (_gate)
        {
            while (_closed > 0 && !_disposed) Monitor.Wait(_gate);
            if (_disposed) return false;
            _inside++;
            return true;
        }
    }

    /// <summary>Comes out.</summary>
    public void Exit()
    {
        lock (_gate)
        {
            if (--_inside > 0) return;
            _empty?.SetResult(Errno.None);
            _empty = null;
        }
    }

    /// <summary>Closes the gate; completes when all are out. A thread that waits for the client's answer is out when that has come.</summary>
    /// <returns>None.</returns>
    public ValueTask<Errno> Close()
    {
        lock (_gate)
        {
            _closed++;
            if (_inside == 0) return ValueTask.FromResult(Errno.None);
            _empty ??= new TaskCompletionSource<Errno>(TaskCreationOptions.RunContinuationsAsynchronously);
            return new ValueTask<Errno>(_empty.Task);
        }
    }

    /// <summary>Ends one <see cref="Close"/>.</summary>
    public void Open()
    {
        lock (_gate)
        {
            if (--_closed == 0) Monitor.PulseAll(_gate);
        }
    }

    /// <summary>Turns away whoever waits and whoever comes.</summary>
    public void Dispose()
    {
        lock (_gate)
        {
            _disposed = true;
            Monitor.PulseAll(_gate);
        }
    }
}
