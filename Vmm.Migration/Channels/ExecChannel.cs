using System.ComponentModel;
using System.Diagnostics;
using System.IO.Pipes;
using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Migration.Channels;

/// <summary>
/// A command that reads the stream from its standard input or writes it to its standard output. A command that leaves bytes unread or exits with an
/// error fails the migration.
/// </summary>
internal sealed class ExecChannel : IMigrationChannel
{
    /// <summary>How long a command that has closed its end of the pipe may take to exit.</summary>
    private static readonly TimeSpan s_lastMoment = TimeSpan.FromSeconds(1);

    private readonly Process _process;
    private readonly PipeChannel _pipe;
    private readonly bool _outgoing;
    private readonly OwnedFd? _ended;
    private readonly OwnedFd _wake = Posix.EventFd();

    private ExecChannel(Process process, PipeChannel pipe, string name, bool outgoing)
    {
        _process = process;
        _pipe = pipe;
        _outgoing = outgoing;
        Name = name;
        // Null means that the command has ended already.
        _ended = Posix.OpenProcess(process.Id, out _);
    }

    public string Name { get; }

    public bool IsBidirectional => false;

    public bool PeerHasClosed => false;

    internal static ExecChannel Start(MigrationAddress address, bool outgoing)
    {
        var info = new ProcessStartInfo(address.Arguments[0]) { RedirectStandardInput = true, RedirectStandardOutput = true, UseShellExecute = false };
        foreach (string argument in address.Arguments.Skip(1)) info.ArgumentList.Add(argument);
        Process process;
        try
        {
            process = Process.Start(info)!;
        }
        catch (Win32Exception e)
        {
            throw new ChannelException($"cannot run '{address.Arguments[0]}': {e.Message}", (Errno)e.NativeErrorCode, e);
        }
        string name = address.ToString();
        if (outgoing)
        {
            // Discard what the command prints: a full pipe would block the command.
            process.OutputDataReceived += static (_, _) => { };
            process.BeginOutputReadLine();
            return new ExecChannel(process, new PipeChannel(null, Take(process.StandardInput.BaseStream), name), name, true);
        }
        process.StandardInput.Close();
        return new ExecChannel(process, new PipeChannel(Take(process.StandardOutput.BaseStream), null, name), name, false);
    }

    public int Read(Span<byte> destination)
    {
        int n = _pipe.Read(destination);
        if (n == 0) CheckExit(s_lastMoment);
        return n;
    }

    public void Write(ReadOnlySpan<byte> source) => Guard(source, static (pipe, s) => pipe.Write(s));

    public void WriteGather(GatherList parts)
    {
        try
        {
            _pipe.WriteGather(parts);
        }
        catch (ChannelException e) when (e.Errno == Errno.EPIPE)
        {
            throw LeftUnread(e);
        }
    }

    public void Shutdown(ChannelShutdown how)
    {
        _pipe.Shutdown(how);
        if (how == ChannelShutdown.Both && !_wake.IsClosed) Posix.SignalEventFd(_wake);
    }

    /// <summary>
    /// Waits until the command has read everything, closes its input and waits for its exit. A command that leaves bytes unread or fails, fails the
    /// channel: its exit alone does not say that it has the stream. A shutdown ends the wait.
    /// </summary>
    public bool Drain(TimeSpan timeout)
    {
        if (!_outgoing) return true;
        long start = Stopwatch.GetTimestamp();
        try
        {
            _pipe.Drain(timeout);
        }
        catch (ChannelException e) when (e.Errno == Errno.EPIPE)
        {
            throw LeftUnread(e);
        }
        _pipe.Shutdown(ChannelShutdown.Write);
        TimeSpan left = timeout - Stopwatch.GetElapsedTime(start);
        return CheckExit(left > TimeSpan.Zero ? left : TimeSpan.Zero);
    }

    public void Dispose()
    {
        _pipe.Dispose();
        try
        {
            if (!_process.WaitForExit(_outgoing ? 1000 : 0)) _process.Kill(entireProcessTree: true);
        }
        catch (InvalidOperationException)
        {
            // The command ended by itself meanwhile.
        }
        _process.Dispose();
        _ended?.Dispose();
        _wake.Dispose();
    }

    private void Guard(ReadOnlySpan<byte> source, Writer write)
    {
        try
        {
            write(_pipe, source);
        }
        catch (ChannelException e) when (e.Errno == Errno.EPIPE)
        {
            throw LeftUnread(e);
        }
    }

    private delegate void Writer(PipeChannel pipe, ReadOnlySpan<byte> source);

    /// <summary>The failure of a command that closed its input early: its exit status if that tells more.</summary>
    private ChannelException LeftUnread(ChannelException cause)
    {
        bool ended = CheckExit(s_lastMoment);
        return new ChannelException($"{Name}: the command {(ended ? "ended with status 0" : "closed its input")} and left bytes unread", Errno.EPIPE, cause);
    }

    private bool CheckExit(TimeSpan timeout)
    {
        bool woken = false;
        if (_ended is not null && Posix.Poll(_ended, Posix.POLLIN, _wake, (int)timeout.TotalMilliseconds, out woken) == 0 && !woken) return false;
        if (woken) throw new ChannelException($"{Name}: the channel was shut down", Errno.ECANCELED);
        // Without a limit this call would also wait for the command's children that still hold its output.
        if (!_process.WaitForExit(s_lastMoment)) return false;
        return _process.ExitCode == 0 ? true : throw new ChannelException($"{Name}: the command failed with exit status {_process.ExitCode}", Errno.EPIPE);
    }

    private static OwnedFd Take(System.IO.Stream stream)
    {
        // The Process class offers its pipes only as buffered streams, but the channel needs the descriptor.
        using (stream)
        {
            nint fd = stream switch
            {
                PipeStream pipe => pipe.SafePipeHandle.DangerousGetHandle(),
                FileStream file => file.SafeFileHandle.DangerousGetHandle(),
                _ => throw new InvalidOperationException($"unexpected stream {stream.GetType()}"),
            };
            return Posix.DuplicateNumber((int)fd, out Errno errno) ?? throw Posix.Error("dup", errno);
        }
    }
}
