using Microsoft.Extensions.Logging;
using Vmm.Core.Devices;
using Vmm.Core.SaveVm;
using Vmm.Migration.Diagnostics;
using Vmm.Migration.Parameters;
using Vmm.Migration.Status;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Attempts;

/// <summary>
/// The parts of one VM that an attempt needs. An attempt copies the settings when it begins; only bandwidth and downtime limits follow later changes of
/// <paramref name="Parameters"/>. <paramref name="Machine"/> is the migration's status.
/// </summary>
internal sealed record MigrationContext(Vm Vm, MigrationBlockers Blockers, MigrationNotifiers Notifiers, MigrationStateMachine Machine,
    MigrationParameterSet Parameters, MigrationCapabilitySet Capabilities, ILogger Logger)
{
    /// <summary>Variant of the framing.</summary>
    internal MigrationCompat Compat { get; set; } = new();

    /// <summary>
    /// Longest time of one PART section, 50 ms as in QEMU. A test that compares streams sets a longer one, because the clock ends sections at other pages
    /// each time.
    /// </summary>
    internal TimeSpan IterateLimit { get; set; } = TimeSpan.FromMilliseconds(50);

    /// <summary>The rehearsal of the switchover's code. It starts with the engine, and an attempt waits for it before it moves pages. Never faults.</summary>
    internal Task Rehearsed { get; init; } = Task.CompletedTask;

    /// <summary>The VM's machine type and UUID, as the stream has them.</summary>
    internal MachineIdentity Identity => new(Vm.Machine, Vm.Uuid);

    internal void LogDowntime(DowntimeReport d) =>
        MigrationLog.Downtime(Logger, d.TotalMs, d.DrainMs, d.DeviceStopMs, d.FinalRamMs, d.DeviceStateMs, d.SendMs, d.LoadMs, d.StartMs);
}
