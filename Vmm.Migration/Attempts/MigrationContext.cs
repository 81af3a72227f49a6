using Microsoft.Extensions.Logging;
using Vmm.Core.Devices;
using Vmm.Core.SaveVm;
using Vmm.Migration.Diagnostics;
using Vmm.Migration.Parameters;
using Vmm.Migration.Status;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Attempts;

/// <summary>What attempts need of one VM; settings here count for attempts that begin later, each of which takes a copy.</summary>
/// <param name="Vm">The VM.</param>
/// <param name="Blockers">Its blockers.</param>
/// <param name="Notifiers">Its notifiers.</param>
/// <param name="Machine">Its migration status.</param>
/// <param name="Parameters">Parameters in force; pacing follows them while a migration runs.</param>
/// <param name="Capabilities">Capabilities in force.</param>
/// <param name="Logger">Log.</param>
internal sealed record MigrationContext(Vm Vm, MigrationBlockers Blockers, MigrationNotifiers Notifiers, MigrationStateMachine Machine,
    MigrationParameterSet Parameters, MigrationCapabilitySet Capabilities, ILogger Logger)
{
    /// <summary>Framing choices.</summary>
    internal MigrationCompat Compat { get; set; } = new();

    /// <summary>Longest time of one PART section; QEMU's is 50 ms. Where the clock cuts RAM is not the same twice, so who compares streams takes a longer one.</summary>
    internal TimeSpan IterateLimit { get; set; } = TimeSpan.FromMilliseconds(50);

    /// <summary>The rehearsal of the switchover's code; begun with the engine, waited for before it counts. Never faults.</summary>
    internal Task Rehearsed { get; init; } = Task.CompletedTask;

    /// <summary>Who sends or takes a stream.</summary>
    internal MachineIdentity Identity => new(Vm.Machine, Vm.Uuid);

    internal void LogDowntime(DowntimeReport d) =>
        MigrationLog.Downtime(Logger, d.TotalMs, d.DrainMs, d.DeviceStopMs, d.FinalRamMs, d.DeviceStateMs, d.SendMs, d.LoadMs, d.StartMs);
}
