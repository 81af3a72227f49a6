using Vmm.Core.Channels;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// Who decides how an outgoing migration ends: this side until everything has been sent, the destination's answer from then on (STREAM.md). A cancel
/// therefore either stops the attempt or asks the destination, never both. Thread-safe.
/// </summary>
internal sealed class HandOver
{
    private enum Stage
    {
        /// <summary>Something is still to be sent: this side decides.</summary>
        Sending,
        /// <summary>The destination may confirm: its answer decides.</summary>
        Sent,
        /// <summary>As before, and the destination has been asked not to confirm.</summary>
        CancelAsked,
    }

    private readonly Lock _gate = new();
    private Stage _stage;

    /// <summary>The destination's answer decides.</summary>
    internal bool IsPeersToDecide
    {
        get { lock (_gate) return _stage != Stage.Sending; }
    }

    /// <summary>The destination has been asked not to confirm.</summary>
    internal bool IsCancelAsked
    {
        get { lock (_gate) return _stage == Stage.CancelAsked; }
    }

    /// <summary>The end of the stream goes out next.</summary>
    /// <param name="latch">Throws its reason if the attempt has ended.</param>
    /// <param name="hasAnswer">Whether the destination answers at all.</param>
    internal void BeforeEnd(FaultLatch latch, bool hasAnswer)
    {
        lock (_gate)
        {
            latch.ThrowIfSet();
            if (hasAnswer) _stage = Stage.Sent;
        }
    }

    /// <summary>Asks the destination not to confirm, if it may.</summary>
    /// <param name="endOurDirection">How it is asked; must not block.</param>
    /// <returns>False while this side still decides.</returns>
    internal bool TryAskToCancel(Action endOurDirection)
    {
        lock (_gate)
        {
            if (_stage == Stage.Sending) return false;
            _stage = Stage.CancelAsked;
            endOurDirection();
            return true;
        }
    }
}
