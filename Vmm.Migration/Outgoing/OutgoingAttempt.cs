using Vmm.Core.Channels;
using Vmm.Core.Interop;
using Vmm.Migration.Attempts;

namespace Vmm.Migration.Outgoing;

/// <summary>The state that the phases of one outgoing migration share. The latch keeps the first reason to end.</summary>
internal sealed class OutgoingAttempt : IDisposable
{
    private readonly CancellationTokenSource _cancel = new();

    internal OutgoingAttempt(MigrationContext vm, OutgoingPlan plan)
    {
        (Vm, Plan) = (vm, plan);
        Latch.OnSet(() =>
        {
            _cancel.Cancel();
            Posix.SignalEventFd(Wake);
        });
    }

    internal MigrationContext Vm { get; }

    internal OutgoingPlan Plan { get; }

    internal FaultLatch Latch { get; } = new();

    /// <summary>An eventfd that ends waits for sockets; signalled with the latch.</summary>
    internal OwnedFd Wake { get; } = Posix.EventFd();

    internal OutgoingProgress Progress { get; } = new();

    internal HandOver HandOver { get; } = new();

    /// <summary>Waits a moment for the destination's own reason, when a channel has failed; any thread.</summary>
    internal Action WaitForCause { get; set; } = static () => { };

    /// <summary>Fires with the latch.</summary>
    internal CancellationToken Cancel => _cancel.Token;

    /// <summary>The phase that an error record names.</summary>
    internal string Phase { get; set; } = "connect";

    public void Dispose()
    {
        _cancel.Dispose();
        Wake.Dispose();
    }
}
