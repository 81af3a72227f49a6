using Vmm.Migration.Attempts;

namespace Vmm.Migration.Incoming;

/// <summary>Where an incoming migration stands in the hand-over; follows <see cref="HandOverTable"/>. The first event wins. Thread-safe.</summary>
internal sealed class Receipt
{
    private readonly Lock _gate = new();
    private DestinationStage _stage;
    private bool _hasFinalWord;

    internal DestinationStage Stage
    {
        get { lock (_gate) return _stage; }
    }

    /// <summary>Takes the last event before the confirmation is sent.</summary>
    /// <param name="hasFinalWord">True when the source answers the confirmation.</param>
    /// <returns>False if the attempt has ended.</returns>
    internal bool TryConfirm(bool hasFinalWord)
    {
        lock (_gate)
        {
            _hasFinalWord = hasFinalWord;
            _stage = HandOverTable.Next(_stage, DestinationEvent.Confirming, hasFinalWord);
            return _stage == DestinationStage.Held;
        }
    }

    /// <summary>Takes an event.</summary>
    /// <returns>The stage behind it.</returns>
    internal DestinationStage On(DestinationEvent happened)
    {
        lock (_gate) return _stage = HandOverTable.Next(_stage, happened, _hasFinalWord);
    }
}
