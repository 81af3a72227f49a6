namespace Vmm.Migration.Attempts;

/// <summary>What a source holds of the VM that it sends (STREAM.md, the hand-over).</summary>
internal enum SourceStage
{
    /// <summary>Something must still be sent, so no destination can have the whole VM: this side decides.</summary>
    Sending,
    /// <summary>Everything has been sent, and no answer has come.</summary>
    Sent,
    /// <summary>As <see cref="Sent"/>; the destination has been asked not to confirm, and its answer decides.</summary>
    CancelAsked,
    /// <summary>The destination has the VM. Final.</summary>
    Moved,
    /// <summary>The VM goes on here. Final.</summary>
    Back,
    /// <summary>The destination may have the VM: it stays paused here until an operator decides. Final.</summary>
    InDoubt,
}

/// <summary>What a source learns.</summary>
internal enum SourceEvent
{
    /// <summary>The last byte is about to leave.</summary>
    AllSent,
    /// <summary>SHUT(0) came.</summary>
    Confirmed,
    /// <summary>SHUT with an error came.</summary>
    Refused,
    /// <summary>The destination ended the connection in good order before it confirmed.</summary>
    PeerClosed,
    /// <summary>The connection broke, or what came made no sense.</summary>
    Lost,
    /// <summary>No answer came within the deadline.</summary>
    Silent,
    /// <summary>An operator cancelled.</summary>
    Cancelled,
    /// <summary>Something failed on this side.</summary>
    Failed,
}

/// <summary>What a destination says to a source that has sent everything.</summary>
internal enum SourcePeer
{
    /// <summary>It confirms and waits for the source's final word.</summary>
    WaitsForFinalWord,
    /// <summary>It confirms and runs.</summary>
    Confirms,
    /// <summary>Nothing, since there is no return path: it runs when it has everything.</summary>
    SaysNothing,
}

/// <summary>What a destination holds of the VM that it takes.</summary>
internal enum DestinationStage
{
    /// <summary>The VM is not complete.</summary>
    Loading,
    /// <summary>The VM is complete and can start; the source is told so, and its final word decides. It must be kept.</summary>
    Held,
    /// <summary>The VM is here. Final.</summary>
    Here,
    /// <summary>The source keeps the VM; what was loaded is thrown away. Final.</summary>
    Gone,
    /// <summary>The source may have let go: the VM stays paused here until an operator decides. Final.</summary>
    InDoubt,
}

/// <summary>What a destination learns.</summary>
internal enum DestinationEvent
{
    /// <summary>The confirmation is about to leave.</summary>
    Confirming,
    /// <summary>The source's final word: it has let go.</summary>
    Released,
    /// <summary>The source's final word: it keeps the VM.</summary>
    Withdrawn,
    /// <summary>The kernel of a source that has no final word has taken the confirmation.</summary>
    Delivered,
    /// <summary>The connection ended or broke.</summary>
    Lost,
    /// <summary>No final word came within the deadline.</summary>
    Silent,
    /// <summary>An operator cancelled.</summary>
    Cancelled,
    /// <summary>The load failed.</summary>
    Failed,
}

/// <summary>
/// The last exchange of a migration, as data: <see cref="Outgoing.HandOver"/> and <see cref="Incoming.Receipt"/> follow these rows, and the model in the tests walks
/// them through every order of messages, losses, deadlines and operators. An event without a row changes nothing.
/// </summary>
internal static class HandOverTable
{
    /// <summary>
    /// A source whose destination waits for its final word. The destination never runs on its own confirmation alone, so whatever happens
    /// before the final word brings the VM back here.
    /// </summary>
    internal static IReadOnlyList<(SourceStage From, SourceEvent On, SourceStage To)> SourceWithFinalWord { get; } =
    [
        (SourceStage.Sending, SourceEvent.AllSent, SourceStage.Sent),
        .. Ends(SourceStage.Sending, SourceStage.Back),
        (SourceStage.Sent, SourceEvent.Confirmed, SourceStage.Moved),
        .. Ends(SourceStage.Sent, SourceStage.Back),
    ];

    /// <summary>A source whose destination runs as soon as it has confirmed (QEMU). Only an answer, or an end in good order, tells that it did not.</summary>
    internal static IReadOnlyList<(SourceStage From, SourceEvent On, SourceStage To)> SourceWithoutFinalWord { get; } =
    [
        (SourceStage.Sending, SourceEvent.AllSent, SourceStage.Sent),
        .. Ends(SourceStage.Sending, SourceStage.Back),
        .. FromAnswer(SourceStage.Sent),
        (SourceStage.Sent, SourceEvent.Cancelled, SourceStage.CancelAsked),
        (SourceStage.Sent, SourceEvent.Failed, SourceStage.CancelAsked),
        .. FromAnswer(SourceStage.CancelAsked),
    ];

    /// <summary>A source without a return path. Behind the last byte a cancel comes too late; the end of the channel tells whether the reader failed.</summary>
    internal static IReadOnlyList<(SourceStage From, SourceEvent On, SourceStage To)> SourceWithoutAnswer { get; } =
    [
        (SourceStage.Sending, SourceEvent.AllSent, SourceStage.Sent),
        (SourceStage.Sending, SourceEvent.Confirmed, SourceStage.Moved), // a file: nobody reads it before this side says that it is done
        .. Ends(SourceStage.Sending, SourceStage.Back),
        (SourceStage.Sent, SourceEvent.Confirmed, SourceStage.Moved),
        (SourceStage.Sent, SourceEvent.Refused, SourceStage.Back),
        (SourceStage.Sent, SourceEvent.Failed, SourceStage.InDoubt),
    ];

    /// <summary>A destination whose source says a final word.</summary>
    internal static IReadOnlyList<(DestinationStage From, DestinationEvent On, DestinationStage To)> DestinationWithFinalWord { get; } =
    [
        (DestinationStage.Loading, DestinationEvent.Confirming, DestinationStage.Held),
        .. NeverComplete,
        (DestinationStage.Held, DestinationEvent.Released, DestinationStage.Here),
        (DestinationStage.Held, DestinationEvent.Withdrawn, DestinationStage.Gone),
        .. Doubts,
    ];

    /// <summary>A destination whose source lets go when it reads the confirmation (QEMU).</summary>
    internal static IReadOnlyList<(DestinationStage From, DestinationEvent On, DestinationStage To)> DestinationWithoutFinalWord { get; } =
    [
        (DestinationStage.Loading, DestinationEvent.Confirming, DestinationStage.Held),
        .. NeverComplete,
        (DestinationStage.Held, DestinationEvent.Delivered, DestinationStage.Here),
        .. Doubts,
    ];

    private static (DestinationStage, DestinationEvent, DestinationStage)[] NeverComplete =>
    [
        (DestinationStage.Loading, DestinationEvent.Withdrawn, DestinationStage.Gone),
        (DestinationStage.Loading, DestinationEvent.Lost, DestinationStage.Gone),
        (DestinationStage.Loading, DestinationEvent.Silent, DestinationStage.Gone),
        (DestinationStage.Loading, DestinationEvent.Cancelled, DestinationStage.Gone),
        (DestinationStage.Loading, DestinationEvent.Failed, DestinationStage.Gone),
    ];

    private static (DestinationStage, DestinationEvent, DestinationStage)[] Doubts =>
    [
        (DestinationStage.Held, DestinationEvent.Lost, DestinationStage.InDoubt),
        (DestinationStage.Held, DestinationEvent.Silent, DestinationStage.InDoubt),
        (DestinationStage.Held, DestinationEvent.Cancelled, DestinationStage.InDoubt),
        (DestinationStage.Held, DestinationEvent.Failed, DestinationStage.InDoubt),
    ];

    /// <summary>The stage after an event.</summary>
    internal static SourceStage Next(SourceStage stage, SourceEvent happened, SourcePeer peer)
    {
        foreach ((SourceStage from, SourceEvent on, SourceStage to) in peer switch
        {
            SourcePeer.WaitsForFinalWord => SourceWithFinalWord, SourcePeer.Confirms => SourceWithoutFinalWord, _ => SourceWithoutAnswer,
        })
            if (from == stage && on == happened) return to;
        return stage;
    }

    /// <inheritdoc cref="Next(SourceStage, SourceEvent, SourcePeer)"/>
    internal static DestinationStage Next(DestinationStage stage, DestinationEvent happened, bool hasFinalWord)
    {
        foreach ((DestinationStage from, DestinationEvent on, DestinationStage to) in hasFinalWord ? DestinationWithFinalWord : DestinationWithoutFinalWord)
            if (from == stage && on == happened) return to;
        return stage;
    }

    /// <summary>Every way to end but the confirmation.</summary>
    private static (SourceStage, SourceEvent, SourceStage)[] Ends(SourceStage from, SourceStage to) =>
    [
        (from, SourceEvent.Refused, to), (from, SourceEvent.PeerClosed, to), (from, SourceEvent.Lost, to), (from, SourceEvent.Silent, to),
        (from, SourceEvent.Cancelled, to), (from, SourceEvent.Failed, to),
    ];

    private static (SourceStage, SourceEvent, SourceStage)[] FromAnswer(SourceStage from) =>
    [
        (from, SourceEvent.Confirmed, SourceStage.Moved), (from, SourceEvent.Refused, SourceStage.Back), (from, SourceEvent.PeerClosed, SourceStage.Back),
        (from, SourceEvent.Lost, SourceStage.InDoubt), (from, SourceEvent.Silent, SourceStage.InDoubt),
    ];
}
