namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>Why a device is reset.</summary>
public enum VfioUserResetReason
{
    /// <summary>The client sent DEVICE_RESET.</summary>
    Device,
    /// <summary>A resuming session was given up.</summary>
    LoadAborted,
}
