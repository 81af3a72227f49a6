using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.DependencyInjection.Extensions;
using Microsoft.Extensions.Logging;
using Vmm.Core.Devices;
using Vmm.Migration.Engine;
using Vmm.Migration.Snapshot;
using Vmm.Migration.Update;

namespace Vmm.Migration.Qmp;

/// <summary>Registers the QMP server.</summary>
public static class QmpBuilderExtensions
{
    /// <summary>
    /// Adds a <see cref="QmpServer"/> per VM; get it from <see cref="Vm.Services"/>. Needs an <see cref="IMigrationEngine"/> in the VM's scope, and
    /// uses an <see cref="ISnapshotService"/> and an <see cref="IVmUpdater"/> if the scope has them. The scope disposes the server with the VM.
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
}
