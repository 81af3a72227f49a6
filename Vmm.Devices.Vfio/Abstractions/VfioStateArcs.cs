namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>One step between migration states.</summary>
internal readonly record struct VfioStateArc(VfioDeviceState From, VfioDeviceState To);

/// <summary>
/// The migration state machine as data (vfio-migration 2; kernel: <c>vfio_mig_get_next_state</c>). A request walks the shortest path of
/// arcs between the states the device has; the data stream of a session never starts in the middle of a path.
/// </summary>
internal static class VfioStateArcs
{
    private const VfioMigrationFlags Base = VfioMigrationFlags.StopCopy;
    private const VfioMigrationFlags P2P = Base | VfioMigrationFlags.P2P;
    private const VfioMigrationFlags Pre = Base | VfioMigrationFlags.PreCopy;
    private const VfioMigrationFlags Both = P2P | VfioMigrationFlags.PreCopy;

    /// <summary>Arcs, the flags that they need, and the flags with which a longer path replaces them.</summary>
    private static readonly (VfioDeviceState From, VfioDeviceState To, VfioMigrationFlags Needs, VfioMigrationFlags Unless)[] s_arcs =
    [
        (VfioDeviceState.Running, VfioDeviceState.Stop, Base, VfioMigrationFlags.P2P),
        (VfioDeviceState.Stop, VfioDeviceState.Running, Base, VfioMigrationFlags.P2P),
        (VfioDeviceState.Running, VfioDeviceState.RunningP2P, P2P, 0),
        (VfioDeviceState.RunningP2P, VfioDeviceState.Running, P2P, 0),
        (VfioDeviceState.RunningP2P, VfioDeviceState.Stop, P2P, 0),
        (VfioDeviceState.Stop, VfioDeviceState.RunningP2P, P2P, 0),
        (VfioDeviceState.Stop, VfioDeviceState.StopCopy, Base, 0),
        (VfioDeviceState.StopCopy, VfioDeviceState.Stop, Base, 0),
        (VfioDeviceState.Stop, VfioDeviceState.Resuming, Base, 0),
        (VfioDeviceState.Resuming, VfioDeviceState.Stop, Base, 0),
        (VfioDeviceState.Running, VfioDeviceState.PreCopy, Pre, 0),
        (VfioDeviceState.PreCopy, VfioDeviceState.Running, Pre, 0),
        (VfioDeviceState.PreCopy, VfioDeviceState.StopCopy, Pre, VfioMigrationFlags.P2P),
        (VfioDeviceState.RunningP2P, VfioDeviceState.PreCopyP2P, Both, 0),
        (VfioDeviceState.PreCopyP2P, VfioDeviceState.RunningP2P, Both, 0),
        (VfioDeviceState.PreCopy, VfioDeviceState.PreCopyP2P, Both, 0),
        (VfioDeviceState.PreCopyP2P, VfioDeviceState.PreCopy, Both, 0),
        (VfioDeviceState.PreCopyP2P, VfioDeviceState.StopCopy, Both, 0),
    ];

    /// <summary>All states.</summary>
    internal static IReadOnlyList<VfioDeviceState> States { get; } = Enum.GetValues<VfioDeviceState>();

    /// <summary>The flag sets that are defined; a device without STOP_COPY cannot migrate.</summary>
    internal static IReadOnlyList<VfioMigrationFlags> FlagSets { get; } = [Base, P2P, Pre, Both];

    /// <summary>Whether a device with these flags has a state.</summary>
    /// <returns>False also for <see cref="VfioDeviceState.Error"/>, which cannot be asked for.</returns>
    internal static bool IsSupported(VfioDeviceState state, VfioMigrationFlags flags) => state switch
    {
        VfioDeviceState.Running or VfioDeviceState.Stop or VfioDeviceState.StopCopy or VfioDeviceState.Resuming => (flags & Base) == Base,
        VfioDeviceState.RunningP2P => (flags & P2P) == P2P,
        VfioDeviceState.PreCopy => (flags & Pre) == Pre,
        VfioDeviceState.PreCopyP2P => (flags & Both) == Both,
        _ => false,
    };

    /// <summary>Whether the device's state can be read.</summary>
    /// <returns>True for PRE_COPY, PRE_COPY_P2P and STOP_COPY.</returns>
    internal static bool IsSaving(VfioDeviceState state) => state is VfioDeviceState.PreCopy or VfioDeviceState.PreCopyP2P or VfioDeviceState.StopCopy;

    /// <summary>Whether the device runs while its state can be read.</summary>
    /// <returns>True for PRE_COPY and PRE_COPY_P2P.</returns>
    internal static bool IsPrecopy(VfioDeviceState state) => state is VfioDeviceState.PreCopy or VfioDeviceState.PreCopyP2P;

    /// <summary>Whether a session's data descriptor is open in a state.</summary>
    /// <returns>True for the saving states and RESUMING.</returns>
    internal static bool HasData(VfioDeviceState state) => IsSaving(state) || state == VfioDeviceState.Resuming;

    /// <summary>Whether the last arc of a path opens a session.</summary>
    /// <param name="from">State before the last arc.</param>
    /// <param name="to">State after it.</param>
    /// <returns>True when it enters the saving states from outside, or RESUMING.</returns>
    internal static bool OpensData(VfioDeviceState from, VfioDeviceState to) =>
        to == VfioDeviceState.Resuming ? from != to : IsSaving(to) && !IsSaving(from);

    /// <summary>The states that a request passes through, target included.</summary>
    /// <param name="from">Present state.</param>
    /// <param name="to">Target.</param>
    /// <param name="flags">What the device can do.</param>
    /// <returns>Empty when the device is there already; null when the request is invalid (EINVAL).</returns>
    internal static IReadOnlyList<VfioDeviceState>? Path(VfioDeviceState from, VfioDeviceState to, VfioMigrationFlags flags)
    {
        if (!IsSupported(from, flags) || !IsSupported(to, flags)) return null;
        if (from == to) return [];
        // From STOP_COPY no path leads back to precopy: the state that was read would not fit what the device does next.
        if (from == VfioDeviceState.StopCopy && IsPrecopy(to)) return null;
        bool inside = IsSaving(from) && IsSaving(to);
        var before = new Dictionary<VfioDeviceState, VfioDeviceState>();
        var queue = new Queue<VfioDeviceState>([from]);
        while (queue.TryDequeue(out VfioDeviceState at))
        {
            foreach (VfioStateArc arc in Arcs(flags))
            {
                if (arc.From != at || arc.To == from || before.ContainsKey(arc.To)) continue;
                bool isInterior = arc.To != to;
                if (isInterior && (arc.To == VfioDeviceState.Resuming || (IsSaving(arc.To) && !inside))) continue;
                before[arc.To] = at;
                if (!isInterior) return Unwind(before, from, to);
                queue.Enqueue(arc.To);
            }
        }
        return null;
    }

    /// <summary>The single steps a device with these flags has.</summary>
    /// <returns>Arcs.</returns>
    internal static IEnumerable<VfioStateArc> Arcs(VfioMigrationFlags flags) =>
        s_arcs.Where(a => (flags & a.Needs) == a.Needs && (flags & a.Unless) == 0).Select(static a => new VfioStateArc(a.From, a.To));

    private static List<VfioDeviceState> Unwind(Dictionary<VfioDeviceState, VfioDeviceState> before, VfioDeviceState from, VfioDeviceState to)
    {
        var path = new List<VfioDeviceState>();
        for (VfioDeviceState at = to; at != from; at = before[at]) path.Add(at);
        path.Reverse();
        return path;
    }
}
