using System.Diagnostics;
using Vmm.Core.SaveVm;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// The first phase: asks notifiers and sections whether the VM may go, then writes header, configuration and START sections (QEMU:
/// <c>qemu_savevm_state_setup</c>).
/// </summary>
internal static class OutgoingSetup
{
    internal static void Run(OutgoingAttempt attempt, OutgoingLink link)
    {
        long start = Stopwatch.GetTimestamp();
        using (attempt.Vm.Vm.Bql.Acquire())
        {
            attempt.Vm.Vm.DeviceTransfer.Reset();
            attempt.Vm.Notifiers.Notify(MigrationEvent.PrecopySetup, attempt.Plan.Mode);
            link.Stream.SavePrepare();
        }
        attempt.Progress.Attach(link);
        StreamHeader.Write(link.File, attempt.Vm.Identity, attempt.Plan.Context);
        if (link.ReturnPath is { } returnPath)
        {
            returnPath.Start(attempt.Plan.IsUpdate);
            link.File.WriteCommand(MigCommand.OpenReturnPath);
            link.File.WritePing(1);
            link.File.WritePing(FinalWord.Offer);
        }
        using (attempt.Vm.Vm.Bql.Acquire()) link.Stream.SaveSetup();
        // The first bytes leave at once: a QEMU destination blocks its monitor until it has seen four of them (stream 14.3).
        link.File.Flush();
        attempt.Progress.SetupMs = (long)Stopwatch.GetElapsedTime(start).TotalMilliseconds;
        attempt.Latch.ThrowIfSet();
    }
}
