using System.ComponentModel;
using System.Diagnostics;
using System.IO.Pipes;
using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Migration.Channels;

/// <summary>
/// A command that reads the stream from its standard input or writes it to its standard output. A command that exits with an error after the last
/// byte fails the migration.
/// </summary>
internal sealed class ExecChannel : IMigrationChannel
{
    private readonly Process _process;
    private readonly PipeChannel _pipe;
    private readonly bool _outgoing;

    private ExecChannel(Process process, PipeChannel pipe, string name, bool outgoing)
    {
        _process = process;
        _pipe = pipe;
        _outgoing = outgoing;
        Name = name;
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
        if (n == 0) CheckExit(TimeSpan.FromSeconds(1));
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
            CheckExit(TimeSpan.FromSeconds(1));
            throw;
        }
    }

    public void Shutdown(ChannelShutdown how) => _pipe.Shutdown(how);

    /// <summary>Closes the command's input and waits for its exit; a failed command fails the channel.</summary>
    public bool Drain(TimeSpan timeout)
    {
        if (!_outgoing) return true;
        _pipe.Shutdown(ChannelShutdown.Write);
        return CheckExit(timeout);
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
    }

    private void Guard(ReadOnlySpan<byte> source, Writer write)
    {
        try
        {
            write(_pipe, source);
        }
        catch (ChannelException e) when (e.Errno == Errno.EPIPE)
        {
            CheckExit(TimeSpan.FromSeconds(1));
            throw;
        }
    }

    private delegate void Writer(PipeChannel pipe, ReadOnlySpan<byte> source);

    private bool CheckExit(TimeSpan timeout)
    {
        if (!_process.WaitForExit(timeout)) return false;
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
