namespace Vmm.Tests.Faults;

/// <summary>What is attempted.</summary>
internal enum AttemptKind
{
    /// <summary>A migration over one connection.</summary>
    Plain,
    /// <summary>A migration with multifd.</summary>
    Multifd,
    /// <summary>A migration of a VM with vfio-user devices, each side's served by a process of its own.</summary>
    Device,
    /// <summary>A live update into a new process.</summary>
    Update,
    /// <summary>A snapshot, saved or loaded.</summary>
    Snapshot,
}

/// <summary>How a destination waits.</summary>
internal enum Listening
{
    /// <summary><c>--incoming tcp:</c>; it takes one attempt after the other.</summary>
    Tcp,
    /// <summary><c>--incoming unix:</c>.</summary>
    Unix,
    /// <summary><c>--incoming defer</c>, and migrate-incoming for each attempt.</summary>
    Defer,
}

/// <summary>One attempt. Everything in it follows from kind and seed, so that a failure can be run again alone.</summary>
internal sealed record AttemptPlan
{
    internal const ulong RamBytes = 16 << 20;

    internal required AttemptKind Kind { get; init; }

    internal required int Seed { get; init; }

    internal required Fault Fault { get; init; }

    /// <summary>How the destination waits. The seed modulo <see cref="Ways"/> decides, so that a lane keeps its destinations.</summary>
    internal Listening Listening => (Seed % Ways) switch { 0 => Listening.Tcp, 1 => Listening.Unix, _ => Listening.Defer };

    /// <summary>
    /// Seeds of one lane are the same modulo this. Most destinations wait for migrate-incoming: one that listens from its start rehearses a migration first,
    /// which takes longer than an attempt.
    /// </summary>
    internal const int Ways = 8;

    /// <summary>True when a deferred destination waits on TCP.</summary>
    internal bool UsesTcp { get; init; }

    internal bool ReturnPath { get; init; } = true;

    /// <summary>Capabilities of the source beside return-path and multifd.</summary>
    internal IReadOnlyList<string> Capabilities { get; init; } = [];

    internal ulong MaxBandwidth { get; init; }

    internal ulong DowntimeLimitMs { get; init; } = 300;

    internal string ZeroPageDetection { get; init; } = "multifd";

    /// <summary>Kind-specific choice: the snapshot's operation, or the way of the update.</summary>
    internal int Variant { get; init; }

    /// <summary>Makes the plan of a seed.</summary>
    internal static AttemptPlan Of(AttemptKind kind, int seed)
    {
        var random = new Random((seed * 8) + (int)kind);
        var plan = new AttemptPlan
        {
            Kind = kind, Seed = seed, Fault = Fault.None,
            UsesTcp = random.Next(2) == 0,
            ReturnPath = random.Next(10) != 0,
            MaxBandwidth = random.Next(8) == 0 ? 64UL << 20 : 0,
            // A device that streams its state has no 20 ms on a busy machine, so such a migration might never switch over.
            DowntimeLimitMs = random.Next(3) switch { 0 when kind != AttemptKind.Device => 20, 1 => 2000, _ => 300 },
            ZeroPageDetection = random.Next(4) switch { 0 => "none", 1 => "legacy", _ => "multifd" },
            Variant = random.Next(1000),
        };
        var capabilities = new List<string>();
        if (random.Next(8) == 0) capabilities.Add("pause-before-switchover");
        if (random.Next(8) == 0 && plan.ReturnPath) capabilities.Add("switchover-ack");
        if (random.Next(8) == 0) capabilities.Add("validate-uuid");
        plan = plan with { Capabilities = capabilities };
        return plan with { Fault = random.Next(20) == 0 ? Fault.None : new FaultMaker(random, plan).Make() };
    }

    public override string ToString() =>
        $"{Kind} {Seed}: {(Kind is AttemptKind.Update or AttemptKind.Snapshot ? $"variant {Variant}" : $"{Listening}, return-path {(ReturnPath ? "on" : "off")}{string.Concat(Capabilities.Select(static c => $", {c}"))}, "
            + $"max-bandwidth {MaxBandwidth}, downtime-limit {DowntimeLimitMs}, zero-page-detection {ZeroPageDetection}")}; {Fault}";
}

/// <summary>
/// Chooses a fault. Most places are near the hand-over: the last sections, the last bytes, the way back and what follows it; the others are spread over the
/// stream by orders of magnitude.
/// </summary>
internal sealed class FaultMaker(Random random, AttemptPlan plan)
{
    private const int StreamBytes = 20 << 20;

    internal Fault Make()
    {
        Fault fault = plan.Kind switch
        {
            AttemptKind.Update => Action(random.Next(4) == 0 ? new Fault { Role = Role.Cpr, Offset = Spread(300), Target = Role.Cpr } : MainPlace(8 << 10), process: 8),
            AttemptKind.Device when random.Next(3) == 0 => OfDevice(),
            AttemptKind.Multifd when random.Next(2) == 0 => Action(DataPlace(), process: 3),
            _ => Action(MainPlace(StreamBytes), process: 3),
        };
        return plan.ReturnPath || plan.Kind == AttemptKind.Update ? fault : WithoutReturnPath(fault);
    }

    /// <summary>A place in the main stream; the fault hits all connections or this one.</summary>
    private Fault MainPlace(int streamBytes)
    {
        var fault = new Fault { Role = Role.Main, Target = random.Next(2) == 0 ? null : Role.Main };
        return random.Next(10) switch
        {
            // The source closes its stream at End, or says more there.
            0 or 1 => fault with { Anchor = Anchor.End, Offset = random.Next(-3, 9) },
            2 => fault with { Anchor = Anchor.End, Offset = -random.Next(600) },
            3 => fault with { Anchor = Anchor.Devices, Offset = random.Next(-200, 400) },
            4 or 5 => fault with { Direction = Direction.Back, Anchor = Anchor.Shut, Offset = random.Next(0, 9) },
            6 => fault with { Direction = Direction.Back, Offset = random.Next(20) },
            7 => fault with { Offset = random.Next(120) },
            _ => fault with { Offset = Spread(streamBytes) },
        };
    }

    /// <summary>A place in a channel of multifd, or a place in the main stream where such a channel suffers.</summary>
    private Fault DataPlace()
    {
        Role data = random.Next(2) == 0 ? Role.Data0 : Role.Data1;
        return random.Next(4) switch
        {
            0 => new Fault { Role = data, Offset = random.Next(100), Target = data },
            1 => MainPlace(64 << 10) with { Target = data },
            2 => new Fault { Role = data, Offset = Spread(StreamBytes / 2), Target = null },
            _ => new Fault { Role = data, Offset = Spread(StreamBytes / 2), Target = data },
        };
    }

    private Fault OfDevice()
    {
        bool source = random.Next(2) == 0;
        Role role = source ? Role.SourceDevice : Role.DestinationDevice;
        Fault place = random.Next(3) == 0
            ? MainPlace(StreamBytes) with { Target = role }
            : new Fault { Role = role, Direction = random.Next(2) == 0 ? Direction.Forward : Direction.Back, Offset = Spread(512 << 10), Target = role };
        return random.Next(5) == 0 ? place with { Action = source ? FaultAction.KillSourceDevice : FaultAction.KillDestinationDevice, Target = null } : Action(place, process: 0);
    }

    /// <summary>Adds what happens.</summary>
    /// <param name="place">The place.</param>
    /// <param name="process">Weight of the faults that hit a process, to 60 of all others.</param>
    private Fault Action(Fault place, int process)
    {
        int pick = random.Next(60 + (process * 6));
        return pick switch
        {
            < 12 => place with { Action = FaultAction.Reset },
            < 24 => place with { Action = FaultAction.Close },
            < 30 => place with { Action = FaultAction.HalfClose, Target = place.Target ?? place.Role },
            < 36 => place with { Action = FaultAction.Stall, Target = place.Target ?? place.Role, Ms = random.Next(50, 2000) },
            < 43 => place with { Action = FaultAction.StallBoth, Ms = random.Next(50, 2000) },
            < 45 => place with { Action = FaultAction.Stall, Target = place.Target ?? place.Role, Ms = Fault.ForEver },
            < 49 => place with { Action = FaultAction.StallBoth, Ms = Fault.ForEver },
            < 51 => place with { Action = FaultAction.Lose, Target = place.Target ?? place.Role },
            < 52 => place with { Action = FaultAction.LoseBoth },
            < 60 => place with { Action = FaultAction.Trickle, Target = place.Target ?? place.Role, Bytes = 1 + Spread(4096) },
            _ => Process(place, (pick - 60) % 6),
        };
    }

    private Fault Process(Fault place, int pick) => pick switch
    {
        0 => place with { Action = FaultAction.FreezeSource, Ms = random.Next(100, 2000) },
        1 => place with { Action = FaultAction.FreezeDestination, Ms = random.Next(100, 2000) },
        2 => place with { Action = FaultAction.KillSource },
        3 => place with { Action = FaultAction.KillDestination },
        4 => place with { Action = FaultAction.Cancel },
        _ => place with { Action = FaultAction.Stop },
    };

    /// <summary>
    /// Without a return path the end of the connection is all that a source learns of its destination (STREAM.md), so no rule says who runs after a
    /// fault behind the last byte, or after bytes that were taken and lost.
    /// </summary>
    private static Fault WithoutReturnPath(Fault fault)
    {
        if (fault.Role == Role.Main && fault.Direction == Direction.Back) return fault with { Direction = Direction.Forward, Anchor = Anchor.Devices };
        if (fault.Anchor == Anchor.End && fault.Offset > -100) fault = fault with { Offset = fault.Offset - 200 };
        return fault.IsSilent || fault.Action == FaultAction.HalfClose ? fault with { Action = FaultAction.Reset } : fault;
    }

    /// <summary>A number from 0 to a limit, all orders of magnitude alike.</summary>
    private int Spread(int limit) => (int)Math.Exp(random.NextDouble() * Math.Log(limit));
}
