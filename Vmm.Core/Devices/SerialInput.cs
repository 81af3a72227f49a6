using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Core.Devices;

/// <summary>
/// Reads bytes from a descriptor for a serial port: only as many as the port has room for, and only while the guest runs, so that a migration loses
/// none. BQL: held for every call.
/// </summary>
/// <param name="services">Services of the device's VM.</param>
/// <param name="port">The port that receives the bytes.</param>
/// <param name="fd">A terminal, pipe or socket; the caller owns it.</param>
/// <param name="ended">Called at the end of the input, or null.</param>
internal sealed class SerialInput(IDeviceServices services, Serial16550 port, OwnedFd fd, Action? ended = null) : IDisposable
{
    private const int MaxBytes = 16;
    private IDisposable? _watch;
    private bool _running, _ended;

    public void Dispose()
    {
        _ended = true;
        Follow();
    }

    internal void SetRunning(bool running)
    {
        _running = running;
        Follow();
    }

    /// <summary>
    /// Watches the descriptor only while the port has room, because an unread descriptor stays readable and would wake the thread again and again.
    /// </summary>
    internal void Follow()
    {
        bool wants = !_ended && _running && port.ReceiveRoom > 0;
        if (wants) _watch ??= services.EventFds.Add(fd, OnReadable);
        else
        {
            _watch?.Dispose();
            _watch = null;
        }
    }

    private void OnReadable()
    {
        using (services.Bql.Acquire())
        {
            if (_watch is null) return;
            Span<byte> bytes = stackalloc byte[MaxBytes];
            int count = Posix.Read(fd, bytes[..Math.Min(port.ReceiveRoom, MaxBytes)], out Errno errno);
            if (count > 0) port.Receive(bytes[..count]);
            bool isEnd = count == 0 || (count < 0 && errno is not (Errno.EAGAIN or Errno.EINTR));
            _ended |= isEnd;
            Follow();
            if (isEnd) ended?.Invoke();
        }
    }
}
