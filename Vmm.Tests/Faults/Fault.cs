using System.Globalization;

namespace Vmm.Tests.Faults;

/// <summary>A connection that a proxy carries.</summary>
internal enum Role
{
    /// <summary>The main channel of a migration.</summary>
    Main,
    /// <summary>The first channel of multifd to arrive.</summary>
    Data0,
    /// <summary>The second one.</summary>
    Data1,
    /// <summary>The channel of an update that carries descriptors.</summary>
    Cpr,
    /// <summary>The vfio-user socket of the source's device.</summary>
    SourceDevice,
    /// <summary>The vfio-user socket of the destination's device.</summary>
    DestinationDevice,
}

/// <summary>A direction of a connection, seen from its client: the source of a migration, the VM of a vfio-user device.</summary>
internal enum Direction
{
    /// <summary>From the client to the server.</summary>
    Forward,
    /// <summary>From the server to the client.</summary>
    Back,
}

/// <summary>The place in a direction from which <see cref="Fault.Offset"/> counts.</summary>
internal enum Anchor
{
    /// <summary>The first byte; of a vfio-user socket the first one after the attempt has begun.</summary>
    Start,
    /// <summary>The first section of a device in the main stream, behind all RAM.</summary>
    Devices,
    /// <summary>The end of the main stream: behind the last byte of VMDESC.</summary>
    End,
    /// <summary>The first byte of the destination's SHUT.</summary>
    Shut,
}

/// <summary>What happens at the place.</summary>
internal enum FaultAction
{
    /// <summary>Nothing.</summary>
    None,
    /// <summary>Both ends see a reset.</summary>
    Reset,
    /// <summary>Both ends see the end of the stream, in good order.</summary>
    Close,
    /// <summary>The receiver of this direction sees the end of the stream, the other direction goes on, and what still comes is lost.</summary>
    HalfClose,
    /// <summary>Nobody reads this direction any more.</summary>
    Stall,
    /// <summary>Nobody reads either direction any more: a dead network.</summary>
    StallBoth,
    /// <summary>What comes in this direction is taken and lost: a relay that acknowledges and dies.</summary>
    Lose,
    /// <summary>The same for both directions.</summary>
    LoseBoth,
    /// <summary>Some bytes go one at a time.</summary>
    Trickle,
    /// <summary>The source's process stands still.</summary>
    FreezeSource,
    /// <summary>The destination's process stands still.</summary>
    FreezeDestination,
    /// <summary>The source's process is killed.</summary>
    KillSource,
    /// <summary>The destination's process is killed.</summary>
    KillDestination,
    /// <summary>The process that serves the source's device is killed.</summary>
    KillSourceDevice,
    /// <summary>The process that serves the destination's device is killed.</summary>
    KillDestinationDevice,
    /// <summary>An operator cancels.</summary>
    Cancel,
    /// <summary>An operator stops the guest at the source.</summary>
    Stop,
}

/// <summary>One fault: when a direction of a connection has carried all bytes before a place, something happens. A seed decides all of it.</summary>
internal sealed record Fault
{
    /// <summary>The largest offset for which no time limit of a stall is known.</summary>
    internal const int ForEver = 0;

    /// <summary>An attempt without a fault.</summary>
    internal static Fault None { get; } = new();

    /// <summary>The connection whose bytes count.</summary>
    internal Role Role { get; init; }

    /// <summary>The direction whose bytes count.</summary>
    internal Direction Direction { get; init; }

    internal Anchor Anchor { get; init; }

    /// <summary>Bytes from the anchor; negative before it.</summary>
    internal long Offset { get; init; }

    internal FaultAction Action { get; init; }

    /// <summary>The connection that suffers; null for all connections of the attempt.</summary>
    internal Role? Target { get; init; }

    /// <summary>How long a stall or a freeze lasts; <see cref="ForEver"/> for one without end.</summary>
    internal int Ms { get; init; }

    /// <summary>How many bytes go one at a time.</summary>
    internal int Bytes { get; init; }

    /// <summary>True if the bytes of one side never reach the other again, and no error says so.</summary>
    internal bool IsSilent => Action is FaultAction.Lose or FaultAction.LoseBoth || (Action is FaultAction.Stall or FaultAction.StallBoth && Ms == ForEver);

    /// <summary>True if the fault ends a process.</summary>
    internal bool IsKill => Action is FaultAction.KillSource or FaultAction.KillDestination;

    /// <summary>True if the fault hits a device, not the migration's connections.</summary>
    internal bool IsOfDevice => Role is Role.SourceDevice or Role.DestinationDevice || Action is FaultAction.KillSourceDevice or FaultAction.KillDestinationDevice;

    public override string ToString()
    {
        if (Action == FaultAction.None) return "no fault";
        string sign = Offset < 0 ? "" : "+";
        string where = string.Create(CultureInfo.InvariantCulture, $"{Role} {Direction} at {Anchor}{sign}{Offset}");
        string what = Action switch
        {
            FaultAction.Trickle => $"{Action} of {Bytes} bytes",
            FaultAction.Stall or FaultAction.StallBoth => Ms == ForEver ? $"{Action} for ever" : $"{Action} for {Ms} ms",
            FaultAction.FreezeSource or FaultAction.FreezeDestination => $"{Action} for {Ms} ms",
            _ => $"{Action}",
        };
        bool isOfConnection = Action is >= FaultAction.Reset and <= FaultAction.LoseBoth;
        return isOfConnection ? $"{what} of {Target?.ToString() ?? "all connections"} when {where}" : $"{what} when {where}";
    }
}
