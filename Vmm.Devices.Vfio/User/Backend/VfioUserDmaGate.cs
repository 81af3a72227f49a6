using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>
/// A gate around the DMA of a device's own threads: <see cref="IVfioUserBackend.Quiesce"/> closes it to stop them (vfio-user 7). Thread-safe. A
/// thread inside must hold no lock that a register access or a state change needs.
/// </summary>
public sealed class VfioUserDmaGate : IDisposable
{
    private readonly object _gate = new();
    private TaskCompletionSource<Errno>? _empty;
    private int _closed, _inside;
    private bool _disposed;

    /// <summary>Enters; waits while the gate is closed.</summary>
    /// <returns>False when the device is being disposed; the thread must not do DMA any more.</returns>
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

    /// <summary>Leaves, after a successful <see cref="Enter"/>.</summary>
    public void Exit()
    {
        lock (_gate)
        {
            if (--_inside > 0) return;
            _empty?.SetResult(Errno.None);
            _empty = null;
        }
    }

    /// <summary>Closes the gate; completes when no thread is inside. A thread that waits for the client's answer stays inside until it comes.</summary>
    /// <returns>Always None.</returns>
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

    /// <summary>Makes <see cref="Enter"/> return false, to threads that wait and to later ones.</summary>
    public void Dispose()
    {
        lock (_gate)
        {
            _disposed = true;
            Monitor.PulseAll(_gate);
        }
    }
}
