using Vmm.Core.Errors;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Parameters;

/// <summary>The parameters in force. A new set is checked as a whole before it replaces the old one. Thread-safe.</summary>
internal sealed class MigrationParameterSet
{
    private volatile MigrationParameters _current = new();

    /// <summary>The parameters in force.</summary>
    public MigrationParameters Current => _current;

    /// <summary>Largest <c>downtime-limit</c>, ms.</summary>
    internal const ulong MaxDowntimeLimitMs = 2_000_000;

    private readonly Lock _gate = new();

    /// <summary>Changes some parameters together, after checking all of them (QEMU: <c>migrate-set-parameters</c>).</summary>
    /// <param name="changes">Parameters and their new values, of the types that <see cref="MigrationParameter"/> gives.</param>
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
    /// <exception cref="ConfigurationException">A value is out of range or not implemented. The message names the parameter in QEMU's words.</exception>
    public void Replace(MigrationParameters next)
    {
        ArgumentNullException.ThrowIfNull(next);
        foreach (MigrationParameter parameter in MigrationParameterTable.All) parameter.With(next, parameter.Get(next));
        if (next.MaxCpuThrottlePercent < next.CpuThrottleInitialPercent)
            throw new ConfigurationException($"Option max-cpu-throttle expects {MigrationParameterTable.MaxCpuThrottleRange}");
        lock (_gate) _current = next;
    }
}

/// <summary>The capabilities in force, all off at first. A change is checked before it takes effect. Thread-safe.</summary>
internal sealed class MigrationCapabilitySet
{
    private volatile MigrationCapabilities _current = MigrationCapabilities.None;

    /// <summary>The capabilities in force.</summary>
    public MigrationCapabilities Current => _current;

    /// <summary>Capabilities that can be switched on; vmm does not implement the others and refuses them by name.</summary>
    public static IReadOnlySet<MigrationCapability> Implemented { get; } = new HashSet<MigrationCapability>
    {
        MigrationCapability.Events, MigrationCapability.ReturnPath, MigrationCapability.PauseBeforeSwitchover, MigrationCapability.ValidateUuid,
        MigrationCapability.SwitchoverAck, MigrationCapability.Multifd, MigrationCapability.XIgnoreShared, MigrationCapability.AutoConverge,
        MigrationCapability.Xbzrle, MigrationCapability.MappedRam,
    };

    /// <summary>True if a capability is on.</summary>
    public bool IsOn(MigrationCapability capability) => _current.IsOn(capability);

    /// <summary>Switches some capabilities together, after checking the resulting set.</summary>
    /// <exception cref="ConfigurationException">A capability is not implemented, needs another one that is off, or does not go with one that is on; nothing is changed.</exception>
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
        if (next.IsOn(MigrationCapability.Multifd) && next.IsOn(MigrationCapability.Xbzrle)) throw new ConfigurationException("Multifd is not compatible with xbzrle");
        if (next.IsOn(MigrationCapability.MappedRam) && next.IsOn(MigrationCapability.Xbzrle)) throw new ConfigurationException("Mapped-ram migration is incompatible with xbzrle");
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

    /// <summary>The wire name, e.g. <c>return-path</c>.</summary>
    public static string ToWireName(this MigrationCapability capability) => s_names[(int)capability];

    /// <summary>Finds a capability by its wire name; false for an unknown name.</summary>
    public static bool TryParse(string name, out MigrationCapability capability)
    {
        int i = Array.IndexOf(s_names, name);
        capability = (MigrationCapability)Math.Max(i, 0);
        return i >= 0;
    }
}
