namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>DEVICE_FEATURE numbers (vfio-migration 1.11).</summary>
internal enum VfioDeviceFeature : ushort
{
    /// <summary>u64 <see cref="VfioMigrationFlags"/>.</summary>
    Migration = 1,
    /// <summary>u32 state, s32 data fd.</summary>
    MigDeviceState = 2,
    /// <summary>Starts logging of DMA writes.</summary>
    DmaLoggingStart = 6,
    /// <summary>Stops it.</summary>
    DmaLoggingStop = 7,
    /// <summary>Reads and clears the log.</summary>
    DmaLoggingReport = 8,
    /// <summary>u64 bytes left to read in STOP_COPY.</summary>
    MigDataSize = 9,
    /// <summary>Second form of the precopy info.</summary>
    MigPrecopyInfoV2 = 12,
}

/// <summary>Operation on a feature.</summary>
[Flags]
internal enum VfioFeatureOp : uint
{
    /// <summary>Reads it.</summary>
    Get = 0x10000,
    /// <summary>Writes it.</summary>
    Set = 0x20000,
    /// <summary>Asks whether the device has the feature, and the operations that are set beside this flag.</summary>
    Probe = 0x40000,
}
