using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;

namespace Vmm.Migration.Update;

/// <summary>
/// Watches the process whose VM this one will take over. If that process ends before the VM has arrived, the VM never arrives, and this process must
/// release the RAM and devices that it already has. One thread, which <see cref="Dispose"/> ends.
/// </summary>
internal sealed class OldProcess : IDisposable
{
    /// <summary>The last bytes of the process may still be in a socket when the process has ended, so wait this long for them.</summary>
    private const int ArrivalMs = 100;

    private readonly CancellationTokenSource _ended = new();
    private readonly OwnedFd _forget = Posix.EventFd();
    private readonly Task _thread;

    internal OldProcess(int pid)
    {
        Ended = _ended.Token;
        _thread = WorkerThread.Run("update/old", () => Watch(pid));
    }

    /// <summary>Fires on a dedicated thread when the process has ended and its last bytes have had time to arrive.</summary>
    internal CancellationToken Ended { get; }

    public void Dispose()
    {
        Posix.SignalEventFd(_forget);
        _thread.GetAwaiter().GetResult();
        _forget.Dispose();
        _ended.Dispose();
    }

    private void Watch(int pid)
    {
        using OwnedFd? process = Posix.OpenProcess(pid, out Errno errno);
        if (process is null && errno != Errno.ESRCH) throw Posix.Error($"process {pid} cannot be watched", errno);
        if (process is not null)
        {
            Posix.Poll(process, Posix.POLLIN, _forget, -1, out bool forgotten);
            if (forgotten) return;
        }
        Posix.Poll(_forget, Posix.POLLIN, null, ArrivalMs, out _);
        _ended.Cancel();
    }
}
