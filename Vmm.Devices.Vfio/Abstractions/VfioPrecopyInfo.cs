namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>What is left to read while the device runs; estimates (uapi: <c>struct vfio_precopy_info</c>).</summary>
/// <param name="InitialBytes">Bytes of the first part, which the destination should have before the switchover.</param>
/// <param name="DirtyBytes">Bytes that have changed since.</param>
/// <param name="IsReinit">A new first part has appeared.</param>
internal readonly record struct VfioPrecopyInfo(ulong InitialBytes, ulong DirtyBytes, bool IsReinit = false);
