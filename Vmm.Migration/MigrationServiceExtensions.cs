using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.DependencyInjection.Extensions;
using Microsoft.Extensions.Logging;
using Vmm.Core.Devices;
using Vmm.Migration.Attempts;
using Vmm.Migration.Engine;
using Vmm.Migration.Qmp;
using Vmm.Migration.Ram;
using Vmm.Migration.Snapshot;
using Vmm.Migration.Update;

namespace Vmm.Migration;

/// <summary>
/// Adds the migration engine and its control plane to a VMM host, and finds them in a VM; in a host without them a look-up throws
/// <see cref="InvalidOperationException"/>. Stateless; thread-safe.
/// </summary>
public static class MigrationServiceExtensions
{
    /// <summary>Adds the sections <c>ram</c> and <c>globalstate</c> and one <see cref="IMigrationEngine"/>, <see cref="ISnapshotService"/> and <see cref="IVmUpdater"/> per VM.</summary>
    /// <param name="builder">The host's builder.</param>
    /// <returns>The builder.</returns>
    public static VmmBuilder AddMigration(this VmmBuilder builder)
    {
        ArgumentNullException.ThrowIfNull(builder);
        builder.AddMachineComponent<RamSection>().AddMachineComponent<GlobalStateSection>();
        builder.Services.TryAddScoped<MigrationEngine>();
        builder.Services.TryAddScoped<IMigrationEngine>(static s => s.GetRequiredService<MigrationEngine>());
        builder.Services.TryAddScoped<IAttempts>(static s => s.GetRequiredService<MigrationEngine>());
        builder.Services.TryAddSingleton(new SnapshotOptions());
        builder.Services.TryAddScoped<ISnapshotService, SnapshotService>();
        builder.Services.TryAddSingleton(new MoveRehearsalOptions());
        builder.Services.TryAddSingleton<MoveRehearsal>();
        builder.Services.TryAddScoped<IVmUpdater, VmUpdater>();
        return builder;
    }

    /// <summary>
    /// Adds a <see cref="QmpServer"/> per VM; get it from <see cref="Vm.Services"/>. Needs an <see cref="IMigrationEngine"/> in the VM's scope;
    /// an <see cref="ISnapshotService"/> and an <see cref="IVmUpdater"/> are used when there are. The scope disposes the server with the VM.
    /// </summary>
    /// <param name="builder">The host's builder.</param>
    /// <returns>The builder.</returns>
    public static VmmBuilder AddQmp(this VmmBuilder builder)
    {
        ArgumentNullException.ThrowIfNull(builder);
        builder.Services.TryAddScoped(static s => new QmpServer(s.GetRequiredService<Vm>(), s.GetRequiredService<IMigrationEngine>(),
            s.GetService<ISnapshotService>(), s.GetService<ILoggerFactory>(), s.GetService<IVmUpdater>()));
        return builder;
    }

    /// <summary>Finds the VM's snapshots.</summary>
    /// <param name="vm">A VM of a host with <see cref="AddMigration"/>.</param>
    /// <returns>The service; lives as long as the VM.</returns>
    public static ISnapshotService Snapshots(this Vm vm)
    {
        ArgumentNullException.ThrowIfNull(vm);
        return vm.Services.GetRequiredService<ISnapshotService>();
    }

    /// <summary>Finds the updater, which carries the VM into a new process on this host.</summary>
    /// <param name="vm">A VM of a host with <see cref="AddMigration"/>.</param>
    /// <returns>The updater; lives as long as the VM.</returns>
    public static IVmUpdater Updater(this Vm vm)
    {
        ArgumentNullException.ThrowIfNull(vm);
        return vm.Services.GetRequiredService<IVmUpdater>();
    }

    /// <summary>Rehearses a move of the VM, so that its first migration or update finds its code compiled. An update does so by itself.</summary>
    /// <param name="vm">A VM of a host with <see cref="AddMigration"/>.</param>
    /// <returns>Null when it worked, or why not; never faults.</returns>
    public static Task<string?> RehearseMoveAsync(this Vm vm)
    {
        ArgumentNullException.ThrowIfNull(vm);
        return vm.Services.RehearseMoveAsync(vm.Options);
    }

    /// <summary>Rehearses the move of a VM that is not made yet, such as one that this process waits for.</summary>
    /// <param name="services">A host with <see cref="AddMigration"/>.</param>
    /// <param name="real">What the VM will be made from; the rehearsal makes a small stand-in for it (<see cref="MoveRehearsalOptions.CreateStandIn"/>).</param>
    /// <returns>Null when it worked, or why not; never faults.</returns>
    public static Task<string?> RehearseMoveAsync(this IServiceProvider services, VmOptions real)
    {
        ArgumentNullException.ThrowIfNull(services);
        return services.GetRequiredService<MoveRehearsal>().RunAsync(real);
    }

    /// <summary>Finds the VM's migration engine.</summary>
    /// <param name="vm">A VM of a host with <see cref="AddMigration"/>.</param>
    /// <returns>The engine; lives as long as the VM.</returns>
    public static IMigrationEngine Migration(this Vm vm)
    {
        ArgumentNullException.ThrowIfNull(vm);
        return vm.Services.GetRequiredService<IMigrationEngine>();
    }
}
