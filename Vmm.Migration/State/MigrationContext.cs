using Microsoft.Extensions.Logging;
using Vmm.Core.Devices;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Migration.Diagnostics;
using Vmm.Migration.Ram;

namespace Vmm.Migration.State;

/// <summary>What the framing needs to know of a machine; the rehearsal has one without a VM.</summary>
/// <param name="Machine">Machine type.</param>
/// <param name="Uuid">UUID.</param>
/// <param name="SaveVm">Sections.</param>
/// <param name="Bql">The lock.</param>
internal sealed record MachineView(string Machine, Guid Uuid, SaveVmRegistry SaveVm, Bql Bql)
{
    internal static MachineView Of(Vm vm) => new(vm.Machine, vm.Uuid, vm.SaveVm, vm.Bql);
}

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

    /// <summary>Longest time of one PART section; QEMU's is 50 ms. Where the clock cuts RAM is not the same twice, so who compares streams takes a longer one.</summary>
    internal TimeSpan IterateLimit { get; set; } = TimeSpan.FromMilliseconds(50);

    /// <summary>The switchover's rehearsal; begun with the engine, waited for before it counts. Never faults.</summary>
    internal Task Rehearsal { get; init; } = Task.CompletedTask;

    internal void LogDowntime(DowntimeReport d) =>
        MigrationLog.Downtime(Logger, d.TotalMs, d.DrainMs, d.DeviceStopMs, d.FinalRamMs, d.DeviceStateMs, d.SendMs, d.LoadMs, d.StartMs);
}
