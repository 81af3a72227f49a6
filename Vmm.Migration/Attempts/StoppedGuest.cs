using Vmm.Core.Devices;
using Vmm.Core.RunStates;

namespace Vmm.Migration.Attempts;

/// <summary>Stops the guest for one attempt and puts it back into the state that it had before. BQL: held for every call.</summary>
internal sealed class StoppedGuest(Vm vm)
{
    private RunState? _entered;

    /// <summary>The run state before the stop.</summary>
    internal RunState Before { get; private set; } = vm.RunState.State;

    /// <summary>The suspended mark before the stop (QEMU: <c>vm_was_suspended</c>).</summary>
    internal bool WasSuspended { get; private set; } = vm.RunState.WasSuspended;

    /// <summary>Stops the guest and enters a run state; a guest that does not run only changes its state.</summary>
    /// <exception cref="Core.Errors.DeviceStateException">A device failed to stop; the guest is stopped, and <see cref="GoOn"/> starts it again.</exception>
    internal void Stop(RunState state)
    {
        (Before, WasSuspended, _entered) = (vm.RunState.State, vm.RunState.WasSuspended, state);
        vm.RunState.Stop(state);
    }

    /// <summary>Leaves the guest stopped: paused if it ran, else in the state that it had.</summary>
    internal void Keep()
    {
        if (_entered is not { } entered || vm.RunState.State != entered) return;
        vm.RunState.Set(RunStateTable.IsLive(Before) ? RunState.Paused : Before);
    }

    /// <summary>
    /// Puts the guest back into the state that it had; does nothing if <see cref="Stop"/> was not called (QEMU: the end of
    /// <c>migration_iteration_finish</c>).
    /// </summary>
    /// <exception cref="Core.Errors.DeviceStateException">A device refused; the guest stays stopped.</exception>
    internal void GoOn()
    {
        if (_entered is not { } entered) return;
        if (RunStateTable.IsRunning(Before)) vm.RunState.Start();
        else if (vm.RunState.State == entered) vm.RunState.Set(Before);
        // The stop set this mark because the guest was suspended. The guest is suspended again, so the mark must go.
        if (Before == RunState.Suspended) vm.RunState.WasSuspended = false;
    }
}
