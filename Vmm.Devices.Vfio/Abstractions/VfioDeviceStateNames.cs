namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>Names as in traces and events.</summary>
internal static class VfioDeviceStateNames
{
    /// <summary>QEMU's name (<c>mig_state_to_str</c>).</summary>
    /// <returns>E.g. <c>STOP_COPY</c>.</returns>
    internal static string ToName(this VfioDeviceState state) => state switch
    {
        VfioDeviceState.Error => "ERROR",
        VfioDeviceState.Stop => "STOP",
        VfioDeviceState.Running => "RUNNING",
        VfioDeviceState.StopCopy => "STOP_COPY",
        VfioDeviceState.Resuming => "RESUMING",
        VfioDeviceState.RunningP2P => "RUNNING_P2P",
        VfioDeviceState.PreCopy => "PRE_COPY",
        VfioDeviceState.PreCopyP2P => "PRE_COPY_P2P",
        _ => $"state {(uint)state}",
    };

    /// <summary>QAPI's name in the event VFIO_MIGRATION.</summary>
    /// <returns>E.g. <c>stop-copy</c>.</returns>
    internal static string ToEventName(this VfioDeviceState state) => state.ToName().ToLowerInvariant().Replace('_', '-');
}
