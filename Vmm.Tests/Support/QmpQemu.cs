using System.Diagnostics;
using NUnit.Framework;
using Vmm.Core.Errors;
using Vmm.Migration.Qmp;

namespace Vmm.Tests.Support;

/// <summary>A QEMU without a machine, for what its monitor says. Binary: VMM_QEMU or the one in PATH; missing is a skip, in CI a failure.</summary>
internal sealed class QmpQemu : IDisposable
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);
    private readonly SocketDirectory _directory = new();
    private readonly Process _process;

    internal QmpQemu(params string[] arguments)
    {
        string binary = Environment.GetEnvironmentVariable("VMM_QEMU") ?? "qemu-system-x86_64";
        var start = new ProcessStartInfo(binary) { RedirectStandardError = true };
        foreach (string a in (string[])["-M", "none", "-nodefaults", "-display", "none", "-accel", "tcg", "-S", "-qmp", $"unix:{SocketPath},server=on,wait=off", .. arguments])
            start.ArgumentList.Add(a);
        try
        {
            _process = Process.Start(start)!;
        }
        catch (System.ComponentModel.Win32Exception e)
        {
            _directory.Dispose();
            Missing.Report($"'{binary}' cannot be started: {e.Message}");
            throw;
        }
        _process.ErrorDataReceived += static (_, line) => { if (line.Data is not null) TestContext.Progress.WriteLine($"qemu: {line.Data}"); };
        _process.BeginErrorReadLine();
    }

    internal string SocketPath => _directory["qmp"];

    internal string this[string name] => _directory[name];

    /// <summary>Connects as soon as QEMU listens.</summary>
    internal QmpClient Connect()
    {
        long end = Environment.TickCount64 + (long)s_deadline.TotalMilliseconds;
        while (true)
        {
            try
            {
                return QmpClient.Connect(SocketPath, s_deadline);
            }
            catch (ChannelException e) when (e.Errno is Errno.ENOENT or Errno.ECONNREFUSED && Environment.TickCount64 < end && !_process.HasExited)
            {
                // QEMU is still starting; the deadline above ends this.
                Thread.Yield();
            }
        }
    }

    internal bool WaitForExit() => _process.WaitForExit(s_deadline);

    public void Dispose()
    {
        if (!_process.HasExited) _process.Kill();
        _process.WaitForExit();
        _process.Dispose();
        _directory.Dispose();
    }
}

/// <summary>A missing counterpart: reported as skipped with the reason, in CI as a failure.</summary>
internal static class Missing
{
    internal static void Report(string what)
    {
        if (Environment.GetEnvironmentVariable("CI") is null or "" or "false") Assert.Ignore(what);
        else Assert.Fail(what);
    }
}
