using System.Diagnostics;
using Vmm.Core.Cpr;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Cpr;

/// <summary>
/// The old process's side of the CPR channel (vfio-migration 7.4; QEMU: <c>cpr_transfer_output</c>): sends the state, ends its direction and waits
/// until the new process closes the channel, which means that it has made its VM and listens on the main channel. For one thread.
/// </summary>
internal static class CprTransferSender
{
    private const int ConnectTimeoutMs = 30_000;
    private static readonly TimeSpan s_refused = TimeSpan.FromSeconds(1);

    /// <summary>Sends the descriptors.</summary>
    /// <param name="address">Address of a UNIX socket.</param>
    /// <param name="table">The descriptors to send.</param>
    /// <param name="wake">Ends every wait.</param>
    /// <param name="changes">The table's <see cref="CprFdTable.Changes"/> when its content was sent.</param>
    /// <returns>False when <paramref name="wake"/> ended it.</returns>
    /// <exception cref="ChannelException">Nobody listens, or the peer closed before it had everything.</exception>
    internal static bool Send(MigrationAddress address, CprFdTable table, OwnedFd wake, out long changes)
    {
        changes = 0;
        using OwnedFd? fd = Connect(address, wake);
        if (fd is null) return false;
        // A peer that reads nothing must not block the thread.
        Posix.SetNonBlocking(fd, true);
        changes = table.Changes;
        foreach (CprState.Part part in CprState.ToParts(table.Entries(), []))
        {
            ReadOnlySpan<byte> left = part.Bytes;
            while (left.Length > 0)
            {
                int n = Posix.SendWithFds(fd, left, part.Fd is null ? [] : [part.Fd], out Errno errno);
                if (n < 0 && errno == Errno.EAGAIN)
                {
                    Posix.Poll(fd, Posix.POLLOUT, wake, -1, out bool ended);
                    if (ended) return false;
                    continue;
                }
                if (n < 0) throw new ChannelException($"CPR channel {address}: {Posix.Describe(errno)}", errno);
                left = left[n..];
            }
        }
        Posix.ShutdownSocket(fd, Posix.SHUT_WR);
        Posix.Poll(fd, Posix.POLLIN, wake, -1, out bool woken);
        return !woken;
    }

    private static OwnedFd? Connect(MigrationAddress address, OwnedFd wake)
    {
        long start = Stopwatch.GetTimestamp();
        while (true)
        {
            OwnedFd fd = Posix.Socket(Posix.AF_UNIX);
            Errno errno = Posix.ConnectUnix(fd, address.Path, wake, ConnectTimeoutMs);
            if (errno == Errno.None) return fd;
            fd.Dispose();
            if (errno == Errno.ECANCELED) return null;
            // bind makes the path a moment before listen accepts connections, so retry.
            if (errno != Errno.ECONNREFUSED || Stopwatch.GetElapsedTime(start) > s_refused)
                throw new ChannelException($"Failed to connect to '{address.Path}': {Posix.Describe(errno)}", errno);
            Posix.Poll(wake, Posix.POLLIN, null, 1, out _);
        }
    }
}

/// <summary>
/// The new process's side of the CPR channel: receives the state before it makes its VM (QEMU: <c>cpr_state_load</c>). <see cref="Dispose"/> closes
/// the socket, on which the old process waits. One thread.
/// </summary>
public sealed class CprTransferReceiver : IDisposable
{
    private readonly OwnedFd _fd;

    private CprTransferReceiver(OwnedFd fd, CprIncoming incoming)
    {
        _fd = fd;
        Incoming = incoming;
    }

    /// <summary>The received descriptors, for <c>VmOptions.Cpr</c>.</summary>
    public CprIncoming Incoming { get; }

    /// <summary>Listens, takes one connection and reads the whole state from it; blocks.</summary>
    /// <param name="address">Address of a UNIX socket.</param>
    /// <param name="cancel">Ends the wait.</param>
    /// <param name="listening">Called on this thread once the socket accepts connections; or null.</param>
    /// <returns>The state; the old process waits until this is disposed.</returns>
    /// <exception cref="ConfigurationException">The address is no UNIX socket.</exception>
    /// <exception cref="VmmException">The socket cannot listen on the address, or the received bytes are no CPR state.</exception>
    /// <exception cref="OperationCanceledException"><paramref name="cancel"/> fired.</exception>
    public static CprTransferReceiver Receive(MigrationAddress address, CancellationToken cancel, Action? listening = null)
    {
        ArgumentNullException.ThrowIfNull(address);
        if (address.Transport != MigrationTransport.Unix) throw new ConfigurationException($"bad cpr channel address {address}; must be unix");
        using var listener = MigrationListener.Listen(address);
        using CancellationTokenRegistration stop = cancel.Register(listener.Stop);
        listening?.Invoke();
        OwnedFd fd = listener.AcceptFd() ?? throw new OperationCanceledException(cancel);
        try
        {
            return new CprTransferReceiver(fd, Read(fd, address, cancel));
        }
        catch
        {
            fd.Dispose();
            throw;
        }
    }

    /// <summary>Closes the CPR channel.</summary>
    public void Dispose() => _fd.Dispose();

    private static CprIncoming Read(OwnedFd fd, MigrationAddress address, CancellationToken cancel)
    {
        Posix.SetNonBlocking(fd, false);
        using CancellationTokenRegistration stop = cancel.Register(() => Posix.ShutdownSocket(fd, Posix.SHUT_RDWR));
        byte[] bytes = new byte[WireLimits.CprStateBytes + 1];
        var fds = new List<OwnedFd>();
        try
        {
            int length = 0;
            while (true)
            {
                int n = Posix.ReceiveWithFds(fd, bytes.AsSpan(length), fds, wait: true, out Errno errno);
                if (n < 0) throw Posix.Error($"CPR channel {address}: cannot receive", errno);
                if (n == 0) break;
                length += n;
                if (length > WireLimits.CprStateBytes) throw new StreamLimitException($"CPR state: more than {WireLimits.CprStateBytes} bytes (WireLimits.CprStateBytes)");
                if (fds.Count > WireLimits.CprFds) throw new StreamLimitException($"CPR state: more than {WireLimits.CprFds} descriptors (WireLimits.CprFds)");
            }
            cancel.ThrowIfCancellationRequested();
            var queue = new Queue<OwnedFd>(fds);
            CprIncoming incoming = CprState.Parse(bytes.AsSpan(0, length), MigrationMode.CprTransfer, _ => queue.TryDequeue(out OwnedFd? next) ? next : null);
            fds.Clear();
            foreach (OwnedFd extra in queue) extra.Dispose();
            return incoming;
        }
        finally
        {
            foreach (OwnedFd left in fds) left.Dispose();
        }
    }
}
