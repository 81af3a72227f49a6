namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>Fixed numbers of the vfio-user protocol, and limits that every peer must keep (vfio-user 1.2, 2, 14).</summary>
internal static class VfioUserLimits
{
    /// <summary>Default for the most data of one message, and this project's own limit.</summary>
    internal const int DataXferBytes = 1 << 20;
    /// <summary>Most data of one message to any other server (vfio-user C-3), because libvfio-user receives a body in one call.</summary>
    internal const int SafeDataBytes = 64 << 10;
    /// <summary>Longest message body of a control command; also the longest VERSION reply (vfio-user C-5).</summary>
    internal const int ControlBytes = 64 << 10;
    /// <summary>Header and fixed part before the data of a region, DMA or migration message, at most.</summary>
    internal const int DataHeadBytes = 32;
    /// <summary>Most regions of a device (QEMU's own limit).</summary>
    internal const uint Regions = 100;
    /// <summary>Most interrupt indices (QEMU's own limit).</summary>
    internal const uint Irqs = 50;
    /// <summary>Most vectors of one interrupt index (PCI's own limit for MSI-X).</summary>
    internal const uint Vectors = 2048;
    /// <summary>Most sparse areas of one region.</summary>
    internal const int SparseAreas = 64;
    /// <summary>Page size of areas, maps and bitmaps.</summary>
    internal const uint PageBytes = 4096;
    /// <summary>Most entries of one REGION_WRITE_MULTI (QEMU sends 200).</summary>
    internal const int WriteMultiEntries = 2048;
}
