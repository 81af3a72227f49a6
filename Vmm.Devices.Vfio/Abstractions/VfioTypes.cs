namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>Migration states of a device (uapi: <c>enum vfio_device_mig_state</c>; spec vfio-migration 2).</summary>
public enum VfioDeviceState : uint
{
    /// <summary>Broken; only a reset leaves it. As a recovery target: reset.</summary>
    Error = 0,
    /// <summary>No DMA, no interrupts, no change.</summary>
    Stop = 1,
    /// <summary>Works; the initial state, and the one after a reset.</summary>
    Running = 2,
    /// <summary>Stopped, its state can be read.</summary>
    StopCopy = 3,
    /// <summary>Stopped, takes state.</summary>
    Resuming = 4,
    /// <summary>Works, but starts no DMA to other devices.</summary>
    RunningP2P = 5,
    /// <summary>Works, its state can be read.</summary>
    PreCopy = 6,
    /// <summary>As <see cref="PreCopy"/>, but starts no DMA to other devices.</summary>
    PreCopyP2P = 7,
}

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

/// <summary>DEVICE_FEATURE numbers (spec vfio-migration 1.11).</summary>
public enum VfioDeviceFeature : ushort
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

/// <summary>What is done with a feature.</summary>
[Flags]
public enum VfioFeatureOp : uint
{
    /// <summary>Reads it.</summary>
    Get = 0x10000,
    /// <summary>Writes it.</summary>
    Set = 0x20000,
    /// <summary>Asks whether it, or the operations added, are there.</summary>
    Probe = 0x40000,
}

/// <summary>Device info (spec vfio-migration 1.4).</summary>
/// <param name="SupportsReset">The flag; advisory, some devices reset without it.</param>
/// <param name="IsPci">A PCI function.</param>
/// <param name="RegionCount">Regions, absent ones counted.</param>
/// <param name="IrqCount">Interrupt indices.</param>
public readonly record struct VfioDeviceInfo(bool SupportsReset, bool IsPci, uint RegionCount, uint IrqCount);

/// <summary>Indices of a PCI device's regions.</summary>
public static class VfioPciRegion
{
    /// <summary>First BAR; the other five follow.</summary>
    public const uint Bar0 = 0;
    /// <summary>Expansion ROM.</summary>
    public const uint Rom = 6;
    /// <summary>Configuration space.</summary>
    public const uint Config = 7;
    /// <summary>VGA.</summary>
    public const uint Vga = 8;
    /// <summary>First device-specific region; what it is, its type says. vfio-user's v1 migration region.</summary>
    public const uint FirstDeviceSpecific = 9;
    /// <summary>TYPE capability of a v1 migration region.</summary>
    public const uint MigrationType = 3;
    /// <summary>Its subtype.</summary>
    public const uint MigrationSubtype = 1;
}

/// <summary>Indices of a PCI device's interrupts.</summary>
public static class VfioPciIrq
{
    /// <summary>INTx.</summary>
    public const uint Intx = 0;
    /// <summary>MSI.</summary>
    public const uint Msi = 1;
    /// <summary>MSI-X.</summary>
    public const uint Msix = 2;
    /// <summary>Fatal error.</summary>
    public const uint Err = 3;
    /// <summary>The host asks to give the device back.</summary>
    public const uint Req = 4;
}

/// <summary>Region flags (uapi: <c>VFIO_REGION_INFO_FLAG_*</c>).</summary>
[Flags]
public enum VfioRegionFlags : uint
{
    /// <summary>None.</summary>
    None = 0,
    /// <summary>Readable.</summary>
    Read = 1,
    /// <summary>Writable.</summary>
    Write = 2,
    /// <summary>Mappable, wholly or in the areas listed.</summary>
    Mmap = 4,
}

/// <summary>A mappable part of a region.</summary>
/// <param name="OffsetBytes">From the start of the region; page aligned.</param>
/// <param name="SizeBytes">Page multiple, not 0.</param>
public readonly record struct VfioRegionArea(ulong OffsetBytes, ulong SizeBytes)
{
    /// <summary>First byte behind it.</summary>
    public ulong End => OffsetBytes + SizeBytes;
}

/// <summary>Region info with its capabilities decoded (spec vfio-migration 1.5). Everything was bounds-checked by the backend.</summary>
public sealed record VfioRegionInfo
{
    /// <summary>Index.</summary>
    public required uint Index { get; init; }

    /// <summary>Flags.</summary>
    public VfioRegionFlags Flags { get; init; }

    /// <summary>Size; 0 when the region is absent.</summary>
    public ulong SizeBytes { get; init; }

    /// <summary>Mappable areas, in the order given and so perhaps unsorted; a wholly mappable region has one. Never empty areas.</summary>
    public IReadOnlyList<VfioRegionArea> Areas { get; init; } = [];

    /// <summary>TYPE capability's type, or 0.</summary>
    public uint Type { get; init; }

    /// <summary>TYPE capability's subtype.</summary>
    public uint Subtype { get; init; }

    /// <summary>The page of the MSI-X table may be mapped.</summary>
    public bool IsMsixMappable { get; init; }

    /// <summary>Whether the device has it.</summary>
    public bool IsPresent => SizeBytes > 0;
}

/// <summary>Interrupt info flags (uapi: <c>VFIO_IRQ_INFO_*</c>).</summary>
[Flags]
public enum VfioIrqInfoFlags : uint
{
    /// <summary>None.</summary>
    None = 0,
    /// <summary>Signals an eventfd.</summary>
    EventFd = 1,
    /// <summary>Can be masked.</summary>
    Maskable = 2,
    /// <summary>Masks itself when it fires.</summary>
    AutoMasked = 4,
    /// <summary>The number of vectors in use cannot grow.</summary>
    NoResize = 8,
}

/// <summary>Interrupt info.</summary>
/// <param name="Flags">Flags.</param>
/// <param name="Count">Vectors; 0 when absent.</param>
public readonly record struct VfioIrqInfo(VfioIrqInfoFlags Flags, uint Count);

/// <summary>Flags of a SET_IRQS request: one kind of data and one action.</summary>
[Flags]
public enum VfioIrqSetFlags : uint
{
    /// <summary>No data.</summary>
    DataNone = 1,
    /// <summary>One byte a vector.</summary>
    DataBool = 2,
    /// <summary>One eventfd a vector.</summary>
    DataEventFd = 4,
    /// <summary>Mask.</summary>
    ActionMask = 8,
    /// <summary>Unmask.</summary>
    ActionUnmask = 16,
    /// <summary>Trigger, or bind the eventfds that the device triggers.</summary>
    ActionTrigger = 32,
}

/// <summary>One SET_IRQS request; vectors <paramref name="Start"/> to <paramref name="Start"/> + <paramref name="Count"/> - 1. Trigger without data and with count 0 disables the index.</summary>
/// <param name="Flags">One data flag and one action.</param>
/// <param name="Index">Interrupt index.</param>
/// <param name="Start">First vector.</param>
/// <param name="Count">Vectors.</param>
public readonly record struct VfioIrqSet(VfioIrqSetFlags Flags, uint Index, uint Start, uint Count);

/// <summary>What is left to read while the device runs; estimates (uapi: <c>struct vfio_precopy_info</c>).</summary>
/// <param name="InitialBytes">Of the first part, which the destination should have before the switchover.</param>
/// <param name="DirtyBytes">Of what changed since.</param>
/// <param name="IsReinit">A new first part has appeared.</param>
public readonly record struct VfioPrecopyInfo(ulong InitialBytes, ulong DirtyBytes, bool IsReinit = false);
