using Vmm.Tools.Cli.Registry;

namespace Vmm.Tools.Cli.Hosting;

/// <summary>
/// The process whose VM this one is to take over. Once it has ended without, nothing will arrive, and what it handed over before, RAM and devices,
/// must not stay in use.
/// </summary>
internal sealed class OldProcess : IDisposable
{
    private static readonly TimeSpan s_poll = TimeSpan.FromMilliseconds(100);
    private readonly CancellationTokenSource _forget = new(), _ended = new();

    public OldProcess(int pid)
    {
        Pid = pid;
        _ = Follow();
    }

    public int Pid { get; }

    /// <summary>Fires when it has ended, and what it sent last has had the time to arrive.</summary>
    public CancellationToken Ended => _ended.Token;

    public void Dispose() => _forget.Cancel();

    private async Task Follow()
    {
        try
        {
            using var timer = new PeriodicTimer(s_poll);
            long? started = VmEntry.ReadStartTicks(Pid);
            while (started is not null && VmEntry.ReadStartTicks(Pid) == started) await timer.WaitForNextTickAsync(_forget.Token);
            await timer.WaitForNextTickAsync(_forget.Token);
            await _ended.CancelAsync();
        }
        catch (OperationCanceledException)
        {
            // Nobody asks any more.
        }
    }
}
