using Vmm.Core.Devices;
using Vmm.Core.Errors;

namespace Vmm.Migration.Snapshot;

/// <summary>
/// Overwrites the state of a stopped VM. If that fails the state is part old and part new, so the VM enters internal-error: <c>cont</c> refuses, and only a
/// reset or a load that succeeds leads out. (QEMU leaves the VM in restore-vm, from where <c>cont</c> runs it.)
/// </summary>
internal static class StateOverwrite
{
    /// <summary>Runs the change. BQL: not held.</summary>
    /// <param name="vm">A stopped VM whose state is held still.</param>
    /// <param name="what">Names the change in the error, e.g. "loading snapshot 'a'".</param>
    /// <param name="overwrite">Changes devices and RAM.</param>
    /// <exception cref="DeviceStateException">It failed; the VM is in internal-error, and the cause is inside.</exception>
    internal static void Run(Vm vm, string what, Action overwrite)
    {
        try
        {
            overwrite();
        }
#pragma warning disable CA1031 // After any failure the guest must not run on this state.
        catch (Exception e)
#pragma warning restore CA1031
        {
            using (vm.Bql.Acquire()) vm.RunState.EnterInternalError();
            throw new DeviceStateException($"{what} failed after it had changed the VM, which stays stopped (internal-error): {VmmException.Describe(e)}", e)
            {
                Hint = "load a snapshot that is whole, or reset the VM",
            };
        }
    }
}
