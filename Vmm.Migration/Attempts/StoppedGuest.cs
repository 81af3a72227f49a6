using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;

namespace Vmm.Migration.Attempts;

/// <summary>
/// Stops the guest for one attempt and puts it back into the state that it had before. Whatever a device does, the VM is never left in the attempt's own
/// run state, out of which no command leads. BQL: held for every call.
/// </summary>
internal sealed class StoppedGuest(Vm vm)
{
    private RunState? _entered;

    /// <summary>The run state before the stop.</summary>
    internal RunState Before { get; private set; } = vm.RunState.State;

    /// <summary>The suspended mark before the stop (QEMU: <c>vm_was_suspended</c>).</summary>
    internal bool WasSuspended { get; private set; } = vm.RunState.WasSuspended;

    /// <summary>Stops the guest and enters a run state; a guest that does not run only changes its state.</summary>
    /// <exception cref="DeviceStateException">A device failed to stop; the guest is stopped, and <see cref="GoOn"/> starts it again.</exception>
    internal void Stop(RunState state)
    {
        (Before, WasSuspended, _entered) = (vm.RunState.State, vm.RunState.WasSuspended, state);
        vm.RunState.Stop(state);
    }

    /// <summary>Leaves the guest stopped: paused if it ran, else in the state that it had.</summary>
    internal void Keep()
    {
        if (_entered is not { } entered || vm.RunState.State != entered) return;
        vm.RunState.Leave(RunStateTable.IsLive(Before) ? RunState.Paused : Before);
    }

    /// <summary>
    /// Puts the guest back into the state that it had, unless somebody has changed the state since <see cref="Stop"/> (QEMU: the end of
    /// <c>migration_iteration_finish</c>).
    /// </summary>
    /// <returns>Why the guest could not be started, or null. It is paused then, and <c>cont</c> tries again (QEMU stays in finish-migrate).</returns>
    internal DeviceStateException? GoOn()
    {
        if (_entered is not { } entered || vm.RunState.State != entered) return null;
        if (!RunStateTable.IsRunning(Before))
        {
            vm.RunState.Leave(Before);
            // The stop set this mark because the guest was suspended. The guest is suspended again, so the mark must go.
            if (Before == RunState.Suspended) vm.RunState.WasSuspended = false;
            return null;
        }
        try
        {
            vm.RunState.Start();
            return null;
        }
#pragma warning disable CA1031 // An attempt that has failed already goes through all of its end, whatever a device or a listener throws here.
        catch (Exception e)
#pragma warning restore CA1031
        {
            if (vm.RunState.IsRunning) return null;
            vm.RunState.Leave(RunState.Paused);
            return new DeviceStateException($"the VM could not be started again and is paused: {e.Message}", e) { Hint = (e as VmmException)?.Hint ?? "'cont' tries again; if a device is broken, reset the VM first" };
        }
    }
}
