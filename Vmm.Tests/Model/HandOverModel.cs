using Vmm.Migration.Attempts;

namespace Vmm.Tests.Model;

/// <summary>What may go wrong in the rules, on purpose: the check must find each.</summary>
internal enum HandOverBug
{
    None,
    /// <summary>The destination resets itself when the final word, or the delivery of its confirmation, is late.</summary>
    HeldIsResetWhenSilent,
    /// <summary>The destination takes the end of the connection for the source's word that it keeps the VM.</summary>
    HeldIsResetWhenLost,
    /// <summary>The destination runs when the next host has its confirmation, although the source has a final word.</summary>
    RunsOnDelivery,
    /// <summary>The source goes on when the connection breaks behind the last byte, although the destination may run.</summary>
    GoesOnWhenLost,
    /// <summary>The source goes on when no answer comes, although the destination may run.</summary>
    GoesOnWhenSilent,
    /// <summary>The source cancels behind the last byte without asking, although the destination may run.</summary>
    CancelsWithoutAsking,
    /// <summary>The source stops its guest for a destination that has not answered.</summary>
    StopsBeforeAnswer,
    /// <summary>The source waits for the answer without a deadline.</summary>
    SourceWaitsForEver,
    /// <summary>The destination waits for the final word without a deadline.</summary>
    DestinationWaitsForEver,
    /// <summary>The destination confirms without having made sure that it can start.</summary>
    ConfirmsWithoutCheck,
    /// <summary>A source that has let go and could not say so goes on.</summary>
    GoesOnWhenWordIsLost,
}

/// <summary>Who the two sides are.</summary>
internal enum Peers
{
    /// <summary>Both are vmm and have a final word.</summary>
    Vmm,
    /// <summary>The destination is QEMU: it runs as soon as it has sent its confirmation.</summary>
    QemuDestination,
    /// <summary>The source is QEMU: it goes on after everything but the confirmation, also after a cancel behind the last byte.</summary>
    QemuSource,
}

/// <summary>Which peers, and what lies between them.</summary>
/// <param name="Peers">The two sides.</param>
/// <param name="HasRelay">A relay takes bytes in the peer's place and can die with them.</param>
/// <param name="Bug">The rule that is broken on purpose.</param>
internal sealed record HandOverSetting(Peers Peers, bool HasRelay, HandOverBug Bug = HandOverBug.None)
{
    internal bool HasFinalWord => Peers == Peers.Vmm;
}

/// <summary>How the link is.</summary>
internal enum Link
{
    /// <summary>Not connected.</summary>
    None,
    /// <summary>Connected; the destination has not taken it yet, because it is busy.</summary>
    Queued,
    /// <summary>Both read.</summary>
    Up,
    /// <summary>Broken, and each side can notice.</summary>
    Broken,
    /// <summary>Broken, and nobody can notice but by a deadline.</summary>
    Mute,
}

/// <summary>
/// One VM, a source and a destination. Each direction has two queues of messages: on the way, and in the receiver's kernel (or in the relay). A break of the link
/// loses the first; a relay that dies loses both. Messages: h hello, p answer to it, e everything, c confirmation, r refusal, l let go, w withdrawn, x end.
/// </summary>
internal readonly record struct HandOverState
{
    public SourceStage Source { get; init; }
    public bool Attempting { get; init; }
    public bool SourceRuns { get; init; }
    public bool SourceAlive { get; init; }
    public bool Answered { get; init; }
    public DestinationStage Destination { get; init; }
    public bool Loading { get; init; }
    public bool DestinationRuns { get; init; }
    public bool DestinationAlive { get; init; }
    public bool CannotStart { get; init; }
    public Link Link { get; init; }
    public string There { get; init; }
    public string ThereKernel { get; init; }
    public string Back { get; init; }
    public string BackKernel { get; init; }
    public bool Forced { get; init; }
    public bool OwnerKilled { get; init; }
    public int Attempts { get; init; }
    public int Cancels { get; init; }
}

/// <summary>
/// The hand-over with everything that may happen to it. The stages follow <see cref="HandOverTable"/>, which the code follows too; the rest says when an event can
/// happen and what is sent.
/// </summary>
internal sealed class HandOverModel(HandOverSetting setting)
{
    private const int MaxAttempts = 2, MaxCancels = 2;

    internal static HandOverState Start => new()
    {
        SourceRuns = true, SourceAlive = true, DestinationAlive = true, There = "", ThereKernel = "", Back = "", BackKernel = "",
    };

    internal ModelResult Check() => ModelChecker.Check(Start, Steps, Broken);

    /// <summary>The invariants.</summary>
    private string? Broken(HandOverState s, int ways)
    {
        if (s.SourceRuns && s.DestinationRuns && !s.Forced) return "both sides run";
        if (!s.OwnerKilled && !SourceCanRun(s) && !DestinationCanRun(s)) return "neither side can ever run";
        if (s.Attempting && s.Source == SourceStage.Sending && !s.SourceRuns && !s.Answered) return "the guest is stopped for a destination that has not answered";
        bool isWaiting = (s.SourceAlive && s.Attempting && s.Source is SourceStage.Sent or SourceStage.CancelAsked) || (s.DestinationAlive && s.Loading && s.Destination is DestinationStage.Held or DestinationStage.Loading);
        if (isWaiting && ways == 0) return "a side waits for ever";
        if (isWaiting && s.Link == Link.Mute && !HasDeadline(s)) return "a side waits for ever";
        if (setting.HasFinalWord && s.Source == SourceStage.InDoubt) return "a source with a final word is in doubt";
        return null;
    }

    private bool HasDeadline(HandOverState s) =>
        (!(s.SourceAlive && s.Attempting && s.Source is SourceStage.Sent or SourceStage.CancelAsked) || setting.Bug != HandOverBug.SourceWaitsForEver)
        && (!(s.DestinationAlive && s.Loading && s.Destination is DestinationStage.Held) || setting.Bug != HandOverBug.DestinationWaitsForEver);

    private static bool SourceCanRun(HandOverState s) => s.SourceAlive && s.Source != SourceStage.Moved;

    private static bool DestinationCanRun(HandOverState s) => s.DestinationAlive && !s.CannotStart && s.Destination is DestinationStage.Held or DestinationStage.Here or DestinationStage.InDoubt;

    internal IEnumerable<(string Step, HandOverState Next)> Steps(HandOverState s) => Source(s).Concat(Destination(s)).Concat(World(s));

    private IEnumerable<(string, HandOverState)> Source(HandOverState s)
    {
        if (!s.SourceAlive) yield break;
        if (!s.Attempting && s is { SourceRuns: true, Attempts: < MaxAttempts, Destination: DestinationStage.Loading or DestinationStage.Gone })
            yield return ("migrate", s with { Attempting = true, Source = SourceStage.Sending, Answered = false, Attempts = s.Attempts + 1, Link = Link.Queued, There = "h", ThereKernel = "", Back = "", BackKernel = "", Destination = DestinationStage.Loading, Loading = false });
        if (s.Attempting)
        {
            if (s.Source == SourceStage.Sending && s.SourceRuns && (s.Answered || setting.Bug == HandOverBug.StopsBeforeAnswer)) yield return ("stop guest", s with { SourceRuns = false });
            if (s.Source == SourceStage.Sending && !s.SourceRuns) yield return ("send everything", On(s, SourceEvent.AllSent) with { There = Send(s, s.There, "e") });
            if (s.BackKernel.Length > 0) yield return ($"source reads {s.BackKernel[0]}", Read(s with { BackKernel = s.BackKernel[1..] }, s.BackKernel[0]));
            if (s.Link == Link.Broken && s.BackKernel.Length == 0) yield return ("source loses the link", End(On(s, SourceEvent.Lost)));
            if (s.Source is SourceStage.Sent or SourceStage.CancelAsked)
            {
                if (setting.Bug != HandOverBug.SourceWaitsForEver) yield return ("source's deadline", End(On(s, SourceEvent.Silent)));
            }
            else if (s.Source == SourceStage.Sending)
            {
                yield return ("source's deadline", End(On(s, SourceEvent.Silent)));
            }
            if (s.Cancels < MaxCancels)
            {
                HandOverState cancelled = On(s, SourceEvent.Cancelled) with { Cancels = s.Cancels + 1 };
                yield return ("cancel at source", cancelled.Source == SourceStage.CancelAsked ? cancelled with { There = Send(s, s.There, "x") } : End(cancelled));
            }
            yield return ("source fails", End(On(s, SourceEvent.Failed)));
        }
        if (setting.Bug == HandOverBug.GoesOnWhenWordIsLost && s is { Source: SourceStage.Moved, SourceRuns: false }) yield return ("the final word is not acknowledged", s with { SourceRuns = true });
        if (s.Source == SourceStage.InDoubt && !s.SourceRuns) yield return ("cont --force at source", s with { SourceRuns = true, Forced = true });
    }

    private HandOverState Read(HandOverState s, char message)
    {
        switch (message)
        {
            case 'p':
                return s with { Answered = true };
            case 'r':
                return End(On(s, SourceEvent.Refused));
            case 'x':
                return End(On(s, SourceEvent.PeerClosed));
            case 'c' when setting.HasFinalWord && (s.BackKernel.StartsWith('x') || s.Link == Link.Broken):
                // The code looks whether the destination has closed before it lets go.
                return End(On(s, SourceEvent.PeerClosed));
            case 'c':
                HandOverState next = On(s, SourceEvent.Confirmed);
                if (next.Source != SourceStage.Moved) return End(next);
                if (!setting.HasFinalWord) return End(next);
                return End(next with { There = Send(s, s.There, "l") });
            default:
                return s;
        }
    }

    /// <summary>An attempt that has ended: the guest goes on here or not, the destination is told, and the connection ends.</summary>
    private HandOverState End(HandOverState s)
    {
        if (!s.Attempting || s.Source is SourceStage.Sending or SourceStage.Sent or SourceStage.CancelAsked) return s;
        string word = setting.HasFinalWord && s.Source == SourceStage.Back ? "wx" : "x";
        return s with { Attempting = false, SourceRuns = s.Source == SourceStage.Back, There = Send(s, s.There, word) };
    }

    private IEnumerable<(string, HandOverState)> Destination(HandOverState s)
    {
        if (!s.DestinationAlive) yield break;
        if (s is { Link: Link.Queued, Loading: false, Destination: DestinationStage.Loading }) yield return ("accept", s with { Link = Link.Up, Loading = true });
        if (s.Loading && s.ThereKernel.Length > 0)
        {
            foreach (HandOverState next in Take(s with { ThereKernel = s.ThereKernel[1..] }, s.ThereKernel[0])) yield return ($"destination reads {s.ThereKernel[0]}", next);
        }
        if (s.Loading)
        {
            if (s.Link == Link.Broken && s.ThereKernel.Length == 0) yield return ("destination loses the link", Leave(On(s, DestinationEvent.Lost)));
            if (s.Destination == DestinationStage.Loading || setting.Bug != HandOverBug.DestinationWaitsForEver) yield return ("destination's deadline", Leave(On(s, DestinationEvent.Silent)));
            if (s.Cancels < MaxCancels) yield return ("cancel at destination", Leave(On(s, DestinationEvent.Cancelled) with { Cancels = s.Cancels + 1 }));
            bool isDelivered = s.Destination == DestinationStage.Held && !s.Back.Contains('c');
            if (isDelivered && s.Link is not (Link.Broken or Link.Mute) && (!setting.HasFinalWord || setting.Bug == HandOverBug.RunsOnDelivery))
                yield return ("confirmation is delivered", Leave(On(s, DestinationEvent.Delivered)));
        }
        if (s is { Destination: DestinationStage.InDoubt, DestinationRuns: false, CannotStart: false }) yield return ("cont --force at destination", s with { DestinationRuns = true, Forced = true });
        if (s is { Destination: DestinationStage.Here, DestinationRuns: false, CannotStart: false, Loading: false }) yield return ("cont at destination", s with { DestinationRuns = true });
    }

    private IEnumerable<HandOverState> Take(HandOverState s, char message)
    {
        switch (message)
        {
            case 'h':
                yield return s with { Back = Send(s, s.Back, "p") };
                break;
            case 'e' when s.ThereKernel.StartsWith('x') || s.ThereKernel.StartsWith('w'):
                yield return Leave(On(s, DestinationEvent.Withdrawn));
                // QEMU does not look.
                if (setting.Peers == Peers.QemuDestination) yield return Confirm(s);
                break;
            case 'e':
                yield return Leave(On(s, DestinationEvent.Failed) with { Back = Send(s, s.Back, "r") });
                if (setting.Bug == HandOverBug.ConfirmsWithoutCheck) yield return On(s, DestinationEvent.Confirming) with { Back = Send(s, s.Back, "c"), CannotStart = true };
                yield return Confirm(s);
                break;
            case 'l':
                yield return Leave(On(s, DestinationEvent.Released));
                break;
            case 'w':
                yield return Leave(On(s, DestinationEvent.Withdrawn));
                break;
            case 'x' when s.Destination == DestinationStage.Held && !setting.HasFinalWord:
                yield return s; // A QEMU source closes when it has read the confirmation; the delivery decides.
                break;
            default:
                yield return Leave(On(s, DestinationEvent.Lost));
                break;
        }
    }

    private HandOverState Confirm(HandOverState s)
    {
        HandOverState held = On(s, DestinationEvent.Confirming) with { Back = Send(s, s.Back, "c") };
        return setting.Peers == Peers.QemuDestination ? Leave(held with { Destination = DestinationStage.Here }) : held;
    }

    private static HandOverState Leave(HandOverState s)
    {
        if (!s.Loading || s.Destination is DestinationStage.Loading or DestinationStage.Held) return s;
        return s with { Loading = false, DestinationRuns = s.Destination == DestinationStage.Here && !s.CannotStart, Back = Send(s, s.Back, "x") };
    }

    private IEnumerable<(string, HandOverState)> World(HandOverState s)
    {
        if (s.Link is Link.Up or Link.Queued)
        {
            if (s.There.Length > 0) yield return ($"{s.There[0]} arrives", s with { There = s.There[1..], ThereKernel = s.ThereKernel + s.There[0] });
            if (s.Back.Length > 0) yield return ($"{s.Back[0]} arrives", s with { Back = s.Back[1..], BackKernel = s.BackKernel + s.Back[0] });
            HandOverState cut = s with { There = "", Back = "" };
            if (setting.HasRelay) cut = cut with { ThereKernel = "", BackKernel = "" };
            yield return (setting.HasRelay ? "the relay dies" : "the link breaks", cut with { Link = Link.Broken });
            yield return ("the link goes mute", cut with { Link = Link.Mute });
        }
        // A relay that dies looks like a peer that closed in good order.
        if (setting.HasRelay && s.Link == Link.Broken && s is { BackKernel: "", Attempting: true }) yield return ("the source sees the relay's end", s with { BackKernel = "x" });
        if (s is { SourceAlive: true, DestinationAlive: true })
        {
            bool hasDestination = s.Destination is DestinationStage.Held or DestinationStage.Here or DestinationStage.InDoubt;
            yield return ("kill source", s with { SourceAlive = false, SourceRuns = false, Attempting = false, OwnerKilled = s.OwnerKilled || !hasDestination || s.Source == SourceStage.Back, There = Send(s, s.There, "x") });
            yield return ("kill destination", s with { DestinationAlive = false, DestinationRuns = false, Loading = false, OwnerKilled = s.OwnerKilled || s.Source == SourceStage.Moved || hasDestination, Back = Send(s, s.Back, "x") });
        }
    }

    private static string Send(HandOverState s, string queue, string messages) => s.Link is Link.Up or Link.Queued ? queue + messages : queue;

    private HandOverState On(HandOverState s, SourceEvent happened)
    {
        SourceStage next = HandOverTable.Next(s.Source, happened, setting.HasFinalWord ? SourcePeer.WaitsForFinalWord : SourcePeer.Confirms);
        if (setting.Peers == Peers.QemuSource && next is SourceStage.InDoubt or SourceStage.CancelAsked) next = SourceStage.Back;
        bool isBehindEnd = s.Source is SourceStage.Sent or SourceStage.CancelAsked;
        if (isBehindEnd && happened == SourceEvent.Lost && setting.Bug == HandOverBug.GoesOnWhenLost) next = SourceStage.Back;
        if (isBehindEnd && happened == SourceEvent.Silent && setting.Bug == HandOverBug.GoesOnWhenSilent) next = SourceStage.Back;
        if (isBehindEnd && happened == SourceEvent.Cancelled && setting.Bug == HandOverBug.CancelsWithoutAsking) next = SourceStage.Back;
        return s with { Source = next };
    }

    private HandOverState On(HandOverState s, DestinationEvent happened)
    {
        DestinationStage next = HandOverTable.Next(s.Destination, happened, setting.HasFinalWord);
        if (s.Destination == DestinationStage.Held)
        {
            if (happened == DestinationEvent.Silent && setting.Bug == HandOverBug.HeldIsResetWhenSilent) next = DestinationStage.Gone;
            if (happened == DestinationEvent.Lost && setting.Bug == HandOverBug.HeldIsResetWhenLost) next = DestinationStage.Gone;
            if (happened == DestinationEvent.Delivered && setting.Bug == HandOverBug.RunsOnDelivery) next = DestinationStage.Here;
        }
        return s with { Destination = next };
    }
}
