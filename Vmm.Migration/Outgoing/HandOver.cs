using Vmm.Core.Channels;
using Vmm.Migration.Attempts;

namespace Vmm.Migration.Outgoing;

/// <summary>Where an outgoing migration stands in the hand-over; follows <see cref="HandOverTable"/>. The first event wins. Thread-safe.</summary>
internal sealed class HandOver
{
    private readonly Lock _gate = new();
    private SourceStage _stage;
    private SourcePeer _peer = SourcePeer.SaysNothing;

    internal SourceStage Stage
    {
        get { lock (_gate) return _stage; }
    }

    /// <summary>True once everything has been sent to a destination that answers and waits for the source's final word.</summary>
    internal bool HasFinalWord
    {
        get { lock (_gate) return _peer == SourcePeer.WaitsForFinalWord; }
    }

    /// <summary>Called before the end of the stream is written. Throws the latch's reason if the attempt has ended.</summary>
    /// <param name="latch">The attempt's.</param>
    /// <param name="peer">What the destination will say; null when this side goes on deciding, because nobody reads the stream yet.</param>
    internal void BeforeEnd(FaultLatch latch, SourcePeer? peer)
    {
        lock (_gate)
        {
            latch.ThrowIfSet();
            if (_stage != SourceStage.Sending) throw new OperationCanceledException("the migration has ended");
            if (peer is not { } other) return;
            _peer = other;
            _stage = HandOverTable.Next(_stage, SourceEvent.AllSent, other);
        }
    }

    /// <summary>Takes an event.</summary>
    /// <returns>The stage behind it.</returns>
    internal SourceStage On(SourceEvent happened)
    {
        lock (_gate) return _stage = HandOverTable.Next(_stage, happened, _peer);
    }
}
