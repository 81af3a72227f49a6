using Vmm.Core.Errors;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Outgoing;

/// <summary>Counts the acknowledgements that the switchover waits for (capability switchover-ack; vfio-migration 3.6). One thread.</summary>
internal sealed class SwitchoverAcks(OutgoingAttempt attempt, OutgoingLink link)
{
    private readonly bool _isOn = attempt.Plan.HasSwitchoverAck;
    private readonly bool _isLegacy = attempt.Plan.Context.Compat.LegacySwitchoverAck;
    private int _requests = attempt.Plan is { HasSwitchoverAck: true, Context.Compat.LegacySwitchoverAck: true } ? 1 : 0;

    /// <summary>True when the destination has acknowledged all first data, or need not.</summary>
    internal bool AreThere => !_isOn || link.ReturnPath!.SwitchoverAcks >= _requests || !attempt.Vm.Vm.RunState.IsRunning;

    /// <summary>Adds the requests that devices have made since the last call.</summary>
    internal void Take()
    {
        if (_isOn && !_isLegacy) _requests += link.Stream.TakeSwitchoverAckRequests();
    }

    /// <summary>Checks after the stop of the VM that no device has new first data, which could no longer be acknowledged.</summary>
    /// <exception cref="DeviceStateException">A device has.</exception>
    internal void ThrowIfMore()
    {
        if (_isOn && !_isLegacy && link.Stream.TakeSwitchoverAckRequests() > 0)
            throw new DeviceStateException("a device produced new first data after the switchover was decided; the destination cannot acknowledge it any more");
    }
}
