namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>Device info (vfio-migration 1.4).</summary>
/// <param name="SupportsReset">The flag; advisory, some devices reset without it.</param>
/// <param name="IsPci">A PCI function.</param>
/// <param name="RegionCount">Number of region indices, absent ones counted.</param>
/// <param name="IrqCount">Number of interrupt indices, absent ones counted.</param>
internal readonly record struct VfioDeviceInfo(bool SupportsReset, bool IsPci, uint RegionCount, uint IrqCount);
