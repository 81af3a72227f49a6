namespace Vmm.Migration.Status;

/// <summary>Why a migration has not stopped its VM yet.</summary>
internal enum SwitchoverWait
{
    /// <summary>Nothing: the VM is about to stop.</summary>
    Nothing,
    /// <summary>The bandwidth has not been measured yet; that takes 100 ms.</summary>
    Bandwidth,
    /// <summary>What is left does not fit into the downtime limit.</summary>
    Size,
    /// <summary>It does not fit, and the last pass brought the end no nearer.</summary>
    Stalled,
    /// <summary>It fits, and still shrinks fast while the VM runs.</summary>
    Shrinking,
    /// <summary>An acknowledgement of the destination is missing (capability switchover-ack).</summary>
    Acknowledgement,
    /// <summary>The destination has not answered at all yet.</summary>
    Answer,
}

/// <summary>Wire names of <see cref="SwitchoverWait"/>.</summary>
internal static class SwitchoverWaitNames
{
    private static readonly string[] s_names = ["nothing", "bandwidth", "size", "stalled", "shrinking", "acknowledgement", "answer"];

    /// <summary>All names, indexed by the enum's value.</summary>
    internal static IReadOnlyList<string> All => s_names;

    /// <summary>Gives the wire name, e.g. <c>shrinking</c>.</summary>
    internal static string ToWireName(this SwitchoverWait wait) => s_names[(int)wait];
}
