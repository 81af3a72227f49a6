using Vmm.Core.Devices;
using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>Property <c>enable-migration</c>.</summary>
internal enum VfioEnableMigration
{
    /// <summary>Migratable if the device is; a blocker otherwise.</summary>
    Auto,
    /// <summary>The device must be migratable, or it is not realized.</summary>
    On,
    /// <summary>Never migratable.</summary>
    Off,
}

/// <summary>A device's migration properties, named as QEMU's (vfio-migration 3.1).</summary>
internal sealed record VfioMigrationOptions
{
    /// <summary><c>enable-migration</c>.</summary>
    internal VfioEnableMigration Enable { get; init; }

    /// <summary><c>x-device-dirty-page-tracking</c>: use the device's own log of DMA writes if it has one.</summary>
    internal bool DeviceDirtyPageTracking { get; init; } = true;

    /// <summary><c>x-pre-copy-dirty-page-tracking</c>: ask for dirty pages while the device still runs.</summary>
    internal bool PreCopyDirtyPageTracking { get; init; } = true;

    /// <summary><c>migration-events</c>: QMP events VFIO_MIGRATION.</summary>
    internal bool MigrationEvents { get; init; }

    /// <summary><c>x-migration-multifd-transfer</c>: the final state over data channels; null for auto, if the channel offers them.</summary>
    internal bool? MultifdTransfer { get; init; }

    /// <summary><c>x-migration-max-queued-buffers-size</c>: most bytes that may wait for their turn.</summary>
    internal ulong MaxQueuedBuffersBytes { get; init; } = ulong.MaxValue;

    /// <summary>What an unknown size counts as.</summary>
    internal const ulong UnknownStopCopyBytes = 100UL << 30;

    /// <summary><c>x-migration-stop-copy-size</c>: bytes of state to expect of a device that does not say; not one of QEMU's properties.</summary>
    internal ulong StopCopyBytes { get; init; } = UnknownStopCopyBytes;

    /// <summary>Reads the properties.</summary>
    /// <returns>The properties.</returns>
    /// <exception cref="ConfigurationException">A value is not one of those allowed.</exception>
    internal static VfioMigrationOptions Read(DeviceOptions options) => new()
    {
        Enable = options.GetString("enable-migration", "auto") switch
        {
            "auto" => VfioEnableMigration.Auto,
            "on" => VfioEnableMigration.On,
            "off" => VfioEnableMigration.Off,
            var other => throw new ConfigurationException($"device '{options.TypeName}': option 'enable-migration' expects on, off or auto, found '{other}'"),
        },
        DeviceDirtyPageTracking = options.GetBool("x-device-dirty-page-tracking", true),
        PreCopyDirtyPageTracking = options.GetBool("x-pre-copy-dirty-page-tracking", true),
        MultifdTransfer = options.GetString("x-migration-multifd-transfer", "auto") switch
        {
            "auto" => null,
            "on" => true,
            "off" => false,
            var other => throw new ConfigurationException($"device '{options.TypeName}': option 'x-migration-multifd-transfer' expects on, off or auto, found '{other}'"),
        },
        MaxQueuedBuffersBytes = options.GetSizeBytes("x-migration-max-queued-buffers-size", ulong.MaxValue),
        StopCopyBytes = options.GetSizeBytes("x-migration-stop-copy-size", UnknownStopCopyBytes),
        MigrationEvents = options.GetBool("migration-events", false),
    };
}
