using Microsoft.Extensions.Logging;
using Vmm.Core.Devices;
using Vmm.Core.SaveVm;
using Vmm.Migration.Diagnostics;
using Vmm.Migration.Ram;

namespace Vmm.Migration.State;

/// <summary>What both directions need of one VM.</summary>
/// <param name="Vm">The VM.</param>
/// <param name="Ram">Its RAM section.</param>
/// <param name="GlobalState">Its globalstate section.</param>
/// <param name="Blockers">Its blockers.</param>
/// <param name="Notifiers">Its notifiers.</param>
/// <param name="Machine">Its migration status.</param>
/// <param name="Parameters">Parameters in force.</param>
/// <param name="Capabilities">Capabilities in force.</param>
/// <param name="Logger">Log.</param>
internal sealed record MigrationContext(Vm Vm, RamMigration Ram, GlobalState GlobalState, MigrationBlockers Blockers, MigrationNotifiers Notifiers,
    MigrationStateMachine Machine, MigrationParameterSet Parameters, MigrationCapabilitySet Capabilities, ILogger Logger)
{
    /// <summary>Framing choices.</summary>
    internal MigrationCompat Compat { get; set; } = new();

    internal void LogDowntime(DowntimeReport d) =>
        MigrationLog.Downtime(Logger, d.TotalMs, d.DrainMs, d.DeviceStopMs, d.FinalRamMs, d.DeviceStateMs, d.SendMs, d.LoadMs, d.StartMs);
}
