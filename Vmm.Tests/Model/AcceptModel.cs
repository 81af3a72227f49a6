namespace Vmm.Tests.Model;

/// <summary>What may go wrong in the rules, on purpose: the check must find each.</summary>
internal enum AcceptBug
{
    None,
    /// <summary>The first connection is the main one, also when it was aborted before it said anything.</summary>
    AnAbortedConnectionIsTheMainOne,
    /// <summary>Connections are looked at one after the other, and a silent one is waited for.</summary>
    ASilentConnectionBlocks,
    /// <summary>A connection that closes or sends garbage uses up the attempt.</summary>
    AProbeEndsTheWait,
    /// <summary>Any two channels make a set, whatever their ids are.</summary>
    ChannelsAreOnlyCounted,
}

/// <summary>
/// A destination with multifd that waits for one source. Connections by kind: m main, 0 and 1 channels of the source, s silent, p probe (closed or garbage), f a channel of a
/// foreign source that is gone, with id 0. Each waits in the lobby until it is decided.
/// </summary>
internal readonly record struct AcceptState
{
    /// <summary>Connections that have come and are not decided, in order.</summary>
    public string Lobby { get; init; }

    /// <summary>Decided connections of a set.</summary>
    public string Set { get; init; }

    /// <summary>What the source has connected so far.</summary>
    public string Sent { get; init; }

    public int Strays { get; init; }
    public bool Loads { get; init; }
    public bool HasEnded { get; init; }
}

/// <summary>The accept phase (STREAM.md): strays cost nothing, however many, and the source's set is loaded.</summary>
internal sealed class AcceptModel(AcceptBug bug = AcceptBug.None)
{
    private const int MaxStrays = 3;

    internal ModelResult Check() => ModelChecker.Check(new AcceptState { Lobby = "", Set = "", Sent = "" }, Steps, Broken);

    private static string? Broken(AcceptState s, int ways)
    {
        if (s.HasEnded) return "the destination stopped waiting without a migration";
        if (s.Loads && !(s.Set.Contains('m') && s.Set.Contains('0') && s.Set.Contains('1') && !s.Set.Contains('f'))) return "a set is loaded that is not the source's";
        if (ways == 0 && !s.Loads) return "the source's set is never loaded";
        return null;
    }

    private IEnumerable<(string, AcceptState)> Steps(AcceptState s)
    {
        if (s.Loads || s.HasEnded) yield break;
        foreach (char part in "m01")
            if (!s.Sent.Contains(part)) yield return ($"source connects {part}", s with { Sent = string.Concat((s.Sent + part).Order()), Lobby = s.Lobby + part });
        if (s.Strays < MaxStrays)
            foreach (char stray in "spf") yield return ($"stray {stray}", s with { Strays = s.Strays + 1, Lobby = s.Lobby + stray });
        for (int i = 0; i < s.Lobby.Length; i++)
        {
            if (bug == AcceptBug.ASilentConnectionBlocks && i > 0) break;
            if (Decide(s with { Lobby = s.Lobby.Remove(i, 1) }, s.Lobby[i]) is { } next) yield return ($"decide {s.Lobby[i]}", next);
        }
    }

    private AcceptState? Decide(AcceptState s, char one)
    {
        switch (one)
        {
            case 's':
                return null; // It says nothing; it waits, and costs a place until the oldest undecided ones are dropped.
            case 'p' when bug == AcceptBug.AProbeEndsTheWait:
                return s with { HasEnded = true };
            case 'p' when bug == AcceptBug.AnAbortedConnectionIsTheMainOne && !s.Set.Contains('m') && !s.Set.Contains('x'):
                return Load(s with { Set = s.Set + 'x' });
            case 'p':
                return s;
            case 'f' when bug != AcceptBug.ChannelsAreOnlyCounted:
                return s; // The channels behind the main one count first, so a leftover with the same id gives way.
            default:
                return Load(s with { Set = string.Concat((s.Set + one).Order()) });
        }
    }

    private AcceptState Load(AcceptState s)
    {
        bool hasMain = s.Set.Contains('m') || s.Set.Contains('x');
        bool hasData = bug == AcceptBug.ChannelsAreOnlyCounted ? s.Set.Count(static c => c is '0' or '1' or 'f') >= 2 : s.Set.Contains('0') && s.Set.Contains('1');
        return hasMain && hasData ? s with { Loads = true } : s;
    }
}
