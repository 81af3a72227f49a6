using Vmm.Core.Errors;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Outgoing;

/// <summary>Counts the acknowledgements that the switchover waits for (capability switchover-ack; vfio-migration 3.6). One thread.</summary>
/// <param name="attempt">The attempt.</param>
/// <param name="link">Its channels.</param>
internal sealed class SwitchoverAcks(OutgoingAttempt attempt, OutgoingLink link)
{
    private readonly bool _isOn = attempt.Plan.HasSwitchoverAck;
    private readonly bool _isLegacy = attempt.Plan.Context.Compat.LegacySwitchoverAck;
    private int _requests = attempt.Plan is { HasSwitchoverAck: true, Context.Compat.LegacySwitchoverAck: true } ? 1 : 0;

    /// <summary>The destination has acknowledged every first part that it must have.</summary>
    internal bool AreThere => !_isOn || link.ReturnPath!.SwitchoverAcks >= _requests || !attempt.Vm.Vm.RunState.IsRunning;

    /// <summary>Takes what devices have asked for since the last time.</summary>
    internal void Take()
    {
        if (_isOn && !_isLegacy) _requests += link.Stream.TakeSwitchoverAckRequests();
    }

    /// <summary>The VM has stopped: a first part that appears now can no longer be acknowledged.</summary>
    /// <exception cref="DeviceStateException">There is one.</exception>
    internal void ThrowIfMore()
    {
        if (_isOn && !_isLegacy && link.Stream.TakeSwitchoverAckRequests() > 0)
            throw new DeviceStateException("a device produced new first data after the switchover was decided; the destination cannot acknowledge it any more");
    }
}
