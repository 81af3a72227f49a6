using Vmm.Core.Channels;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// Says which side decides how an outgoing migration ends: this side until everything has been sent, the destination's answer from then on (STREAM.md). A
/// cancel therefore either stops the attempt or asks the destination, never both. Thread-safe.
/// </summary>
internal sealed class HandOver
{
    private enum Stage
    {
        /// <summary>Something must still be sent: this side decides.</summary>
        Sending,
        /// <summary>Everything has been sent: the destination's answer decides.</summary>
        Sent,
        /// <summary>As <see cref="Sent"/>, and the destination has been asked not to confirm.</summary>
        CancelAsked,
    }

    private readonly Lock _gate = new();
    private Stage _stage;

    /// <summary>True when the destination's answer decides.</summary>
    internal bool IsPeersToDecide
    {
        get { lock (_gate) return _stage != Stage.Sending; }
    }

    /// <summary>True when the destination has been asked not to confirm.</summary>
    internal bool IsCancelAsked
    {
        get { lock (_gate) return _stage == Stage.CancelAsked; }
    }

    /// <summary>Called before the end of the stream is written. Throws the latch's reason if the attempt has ended.</summary>
    /// <param name="latch">The attempt's.</param>
    /// <param name="hasAnswer">False when the destination cannot answer; this side then goes on deciding.</param>
    internal void BeforeEnd(FaultLatch latch, bool hasAnswer)
    {
        lock (_gate)
        {
            latch.ThrowIfSet();
            if (hasAnswer) _stage = Stage.Sent;
        }
    }

    /// <summary>Asks the destination not to confirm.</summary>
    /// <param name="endOurDirection">Asks it by closing this side's direction; must not block.</param>
    /// <returns>False when this side still decides; then nothing was asked.</returns>
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
