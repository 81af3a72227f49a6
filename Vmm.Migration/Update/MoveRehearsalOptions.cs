using Vmm.Core.Devices;

namespace Vmm.Migration.Update;

/// <summary>How this host rehearses moves; register an instance in the container before <see cref="MigrationServiceExtensions.AddMigration"/>.</summary>
public sealed record MoveRehearsalOptions
{
    /// <summary>
    /// Makes the stand-in for a VM of the given options. The string is a path prefix that the stand-in may use for sockets, which it must remove itself.
    /// </summary>
    public Func<VmOptions, string, MoveStandIn> CreateStandIn { get; init; } = static (real, _) => new MoveStandIn(real);

    /// <summary>A directory for sockets that only this user can write; null for a temporary one.</summary>
    public string? Directory { get; init; }

    /// <summary>Called with the reason when a rehearsal fails, on its thread. The next move works, but may stop the guest for longer.</summary>
    public Action<string>? Failed { get; init; }
}
