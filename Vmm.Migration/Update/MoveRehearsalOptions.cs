using Vmm.Core.Devices;

namespace Vmm.Migration.Update;

/// <summary>How this host rehearses moves; register an instance in the container before <see cref="MigrationServiceExtensions.AddMigration"/>.</summary>
public sealed record MoveRehearsalOptions
{
    /// <summary>
    /// Makes the stand-in for a VM of these options. A path that begins with the second argument is free for a socket of the stand-in's, which removes
    /// it.
    /// </summary>
    public Func<VmOptions, string, MoveStandIn> CreateStandIn { get; init; } = static (real, _) => new MoveStandIn(real);

    /// <summary>A directory of this user alone for sockets; null for a temporary one.</summary>
    public string? Directory { get; init; }

    /// <summary>Called with the reason when a rehearsal fails, which nothing else depends on; the guest may stand still for longer in the next move.</summary>
    public Action<string>? Failed { get; init; }
}
