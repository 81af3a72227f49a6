using System.Globalization;
using System.Text;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Update;

/// <summary>
/// The UNIX socket on which the old process receives reports. The new process sends each report as one line on its own connection: first that it
/// listens on the CPR channel (<c>listening</c>), later that it runs the VM (<c>running PID NS</c>, CLOCK_MONOTONIC) or holds it (<c>held PID</c>). A program on trial reports that it
/// could take the VM (<c>tried WORD</c>). One thread, which <see cref="Dispose"/> ends.
/// </summary>
internal sealed class UpdateReports : IDisposable
{
    private const string ListeningLine = "listening", RunningWord = "running", HeldWord = "held", TriedWord = "tried";
    private const int MaxLineBytes = WireLimits.UpdateReportBytes, LineTimeoutMs = 5000;

    private readonly MigrationListener _listener;
    private readonly TaskCompletionSource _listening = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly TaskCompletionSource<(int Pid, long AtNs)> _running = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly TaskCompletionSource<string> _tried = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly Task _thread;

    /// <summary>Listens on a path.</summary>
    /// <exception cref="ChannelException">The process cannot listen on the path.</exception>
    internal UpdateReports(string path)
    {
        _listener = MigrationListener.Listen(UpdateTicket.Unix(path));
        _thread = WorkerThread.Run("update/reports", Run);
    }

    /// <summary>Completes when the new process accepts descriptors; faults if something else than a report arrives.</summary>
    internal Task Listening => _listening.Task;

    /// <summary>Completes when the new process runs the VM, with its pid and the time of the VM's start (CLOCK_MONOTONIC, ns); faults if it holds the VM.</summary>
    internal Task<(int Pid, long AtNs)> Running => _running.Task;

    /// <summary>Completes with the word that a program on trial reported.</summary>
    internal Task<string> Tried => _tried.Task;

    /// <summary>Called by a program on trial: reports that it could take the VM.</summary>
    internal static void SendTried(string path, string word) => Send(path, $"{TriedWord} {word}");

    /// <summary>Called by the new process: reports that it listens.</summary>
    internal static void SendListening(string path) => Send(path, ListeningLine);

    /// <summary>Called by the new process: reports that it runs the VM.</summary>
    internal static void SendRunning(string path, long atNs) => Send(path, string.Create(CultureInfo.InvariantCulture, $"{RunningWord} {Environment.ProcessId} {atNs}"));

    /// <summary>Called by the new process: reports that it has the VM and keeps it paused.</summary>
    internal static void SendHeld(string path) => Send(path, string.Create(CultureInfo.InvariantCulture, $"{HeldWord} {Environment.ProcessId}"));

    public void Dispose()
    {
        _listener.Stop();
        _thread.GetAwaiter().GetResult();
        _listener.Dispose();
        _listening.TrySetCanceled();
        _running.TrySetCanceled();
        _tried.TrySetCanceled();
    }

    /// <summary>Sends a report and ignores failures: an old process that has ended needs none, and one that hangs must not delay the VM.</summary>
    private static void Send(string path, string line)
    {
        using OwnedFd fd = Posix.Socket(Posix.AF_UNIX);
        if (Posix.ConnectUnix(fd, path, null, LineTimeoutMs) == Errno.None) Posix.SendWithFds(fd, Encoding.ASCII.GetBytes(line + "\n"), [], out _);
    }

    private void Run()
    {
        try
        {
            while (_listener.AcceptFd() is { } peer)
            {
                using (peer) Take(ReadLine(peer));
            }
        }
        catch (VmmException e)
        {
            Fail(e);
        }
    }

    private void Take(string? line)
    {
        string[] words = line?.Split(' ') ?? [];
        if (words is [ListeningLine]) _listening.TrySetResult();
        else if (words is [TriedWord, var word]) _tried.TrySetResult(word);
        else if (words is [RunningWord, var pid, var at] && int.TryParse(pid, NumberStyles.None, CultureInfo.InvariantCulture, out int p)
            && long.TryParse(at, NumberStyles.None, CultureInfo.InvariantCulture, out long ns)) _running.TrySetResult((p, ns));
        else if (words is [HeldWord, var holder] && int.TryParse(holder, NumberStyles.None, CultureInfo.InvariantCulture, out int h))
            _running.TrySetException(new MigrationFailedException($"update: process {h} has the VM and keeps it paused, because it has not heard that this process has let go")
            {
                Hint = "start the VM there with 'cont --force'",
            });
        // Ignore a peer that sends nothing, such as a probe for stale sockets.
        else if (line is not null) Fail(new MigrationFailedException($"update: the new process reported '{line}'; expected '{ListeningLine}', '{RunningWord} PID NS' or '{HeldWord} PID'"));
    }

    private void Fail(VmmException error)
    {
        _listening.TrySetException(error);
        _running.TrySetException(error);
        _tried.TrySetException(error);
    }

    private static string? ReadLine(OwnedFd peer)
    {
        byte[] bytes = new byte[MaxLineBytes];
        int length = 0;
        while (length < bytes.Length && !bytes.AsSpan(0, length).Contains((byte)'\n'))
        {
            if (Posix.Poll(peer, Posix.POLLIN, null, LineTimeoutMs, out _) == 0) break;
            int n = Posix.Receive(peer, bytes.AsSpan(length), Posix.MSG_DONTWAIT, out _);
            if (n <= 0) break;
            length += n;
        }
        return length == 0 ? null : Encoding.ASCII.GetString(bytes, 0, length).TrimEnd('\n');
    }
}
