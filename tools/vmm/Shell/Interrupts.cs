using System.Runtime.InteropServices;

namespace Vmm.Tools.Cli.Shell;

/// <summary>Ctrl-C, SIGTERM and SIGHUP as a token; a second one ends the process at once.</summary>
internal sealed class Interrupts : IDisposable
{
    private readonly CancellationTokenSource _source = new();
    private readonly PosixSignalRegistration[] _registrations;

    public Interrupts() => _registrations =
        [.. new[] { PosixSignal.SIGINT, PosixSignal.SIGTERM, PosixSignal.SIGHUP }.Select(s => PosixSignalRegistration.Create(s, OnSignal))];

    public CancellationToken Token => _source.Token;

    public void Dispose()
    {
        foreach (PosixSignalRegistration one in _registrations) one.Dispose();
        _source.Dispose();
    }

    private void OnSignal(PosixSignalContext signal)
    {
        signal.Cancel = true;
        if (_source.IsCancellationRequested) Environment.Exit((int)ExitCode.Cancelled);
        // Do not cancel on the signal thread, because a slow callback would delay the second signal.
        _ = Task.Run(_source.Cancel);
    }
}
