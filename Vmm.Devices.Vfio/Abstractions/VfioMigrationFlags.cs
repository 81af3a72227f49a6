namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>What a device's migration can do (uapi: <c>struct vfio_device_feature_migration</c>).</summary>
[Flags]
public enum VfioMigrationFlags : ulong
{
    /// <summary>Cannot migrate.</summary>
    None = 0,
    /// <summary>RUNNING, STOP, STOP_COPY and RESUMING.</summary>
    StopCopy = 1,
    /// <summary>RUNNING_P2P.</summary>
    P2P = 2,
    /// <summary>PRE_COPY.</summary>
    PreCopy = 4,
}
