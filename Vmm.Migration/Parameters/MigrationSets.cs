using Vmm.Core.Errors;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Parameters;

/// <summary>The parameters in force. Replacing them checks the new set as a whole; thread-safe.</summary>
internal sealed class MigrationParameterSet
{
    private volatile MigrationParameters _current = new();

    /// <summary>The parameters in force.</summary>
    public MigrationParameters Current => _current;

    /// <summary>Largest <c>downtime-limit</c>, ms.</summary>
    internal const ulong MaxDowntimeLimitMs = 2_000_000;

    private readonly Lock _gate = new();

    /// <summary>Changes some parameters at once; all are checked first (QEMU: <c>migrate-set-parameters</c>).</summary>
    /// <param name="changes">Parameters and their new values, typed as <see cref="MigrationParameter"/> says.</param>
    /// <exception cref="ConfigurationException">A value is out of range or not implemented; nothing is changed.</exception>
    internal void Apply(IEnumerable<KeyValuePair<MigrationParameter, object>> changes)
    {
        ArgumentNullException.ThrowIfNull(changes);
        lock (_gate)
        {
            MigrationParameters next = _current;
            foreach ((MigrationParameter parameter, object value) in changes) next = parameter.With(next, value);
            Replace(next);
        }
    }

    /// <summary>Replaces the set after checking it.</summary>
    /// <param name="next">The new set.</param>
    /// <exception cref="ConfigurationException">A value is out of range or not implemented; names the parameter, text is QEMU's.</exception>
    public void Replace(MigrationParameters next)
    {
        ArgumentNullException.ThrowIfNull(next);
        foreach (MigrationParameter parameter in MigrationParameterTable.All) parameter.With(next, parameter.Get(next));
        lock (_gate) _current = next;
    }
}

/// <summary>The capabilities in force, all off at first. Replacing them checks the resulting set; thread-safe.</summary>
internal sealed class MigrationCapabilitySet
{
    private volatile MigrationCapabilities _current = MigrationCapabilities.None;

    /// <summary>The capabilities in force.</summary>
    public MigrationCapabilities Current => _current;

    /// <summary>Capabilities that may be switched on today; switching on another is refused with its name.</summary>
    public static IReadOnlySet<MigrationCapability> Implemented { get; } = new HashSet<MigrationCapability>
    {
        MigrationCapability.Events, MigrationCapability.ReturnPath, MigrationCapability.PauseBeforeSwitchover, MigrationCapability.ValidateUuid,
        MigrationCapability.SwitchoverAck, MigrationCapability.Multifd, MigrationCapability.XIgnoreShared,
    };

    /// <summary>True if a capability is on.</summary>
    /// <param name="capability">The capability.</param>
    /// <returns>Its state.</returns>
    public bool IsOn(MigrationCapability capability) => _current.IsOn(capability);

    /// <summary>Applies changes at once after checking the result.</summary>
    /// <param name="changes">Capability and new state.</param>
    /// <exception cref="ConfigurationException">A capability is not implemented or does not go with another; nothing is changed.</exception>
    public void Apply(IEnumerable<KeyValuePair<MigrationCapability, bool>> changes)
    {
        ArgumentNullException.ThrowIfNull(changes);
        MigrationCapabilities next = _current;
        foreach ((MigrationCapability capability, bool on) in changes)
        {
            if (on && !Implemented.Contains(capability))
                throw new ConfigurationException($"capability '{capability.ToWireName()}' is not implemented in this version of vmm");
            next = next.With(capability, on);
        }
        if (next.IsOn(MigrationCapability.SwitchoverAck) && !next.IsOn(MigrationCapability.ReturnPath))
            throw new ConfigurationException("Capability 'switchover-ack' requires capability 'return-path'");
        _current = next;
    }
}

/// <summary>Wire names of <see cref="MigrationCapability"/>.</summary>
internal static class MigrationCapabilityNames
{
    private static readonly string[] s_names =
    [
        "xbzrle", "rdma-pin-all", "auto-converge", "events", "postcopy-ram", "x-colo", "release-ram", "return-path", "pause-before-switchover",
        "multifd", "dirty-bitmaps", "postcopy-blocktime", "late-block-activate", "x-ignore-shared", "validate-uuid", "background-snapshot",
        "zero-copy-send", "postcopy-preempt", "switchover-ack", "dirty-limit", "mapped-ram",
    ];

    /// <summary>All names, indexed by the enum's value.</summary>
    public static IReadOnlyList<string> All => s_names;

    /// <summary>The wire name.</summary>
    /// <param name="capability">A capability.</param>
    /// <returns>E.g. <c>return-path</c>.</returns>
    public static string ToWireName(this MigrationCapability capability) => s_names[(int)capability];

    /// <summary>Finds a capability by its wire name.</summary>
    /// <param name="name">The name.</param>
    /// <param name="capability">The capability.</param>
    /// <returns>False for an unknown name.</returns>
    public static bool TryParse(string name, out MigrationCapability capability)
    {
        int i = Array.IndexOf(s_names, name);
        capability = (MigrationCapability)Math.Max(i, 0);
        return i >= 0;
    }
}
