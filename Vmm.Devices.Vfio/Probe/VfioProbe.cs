using System.Buffers.Binary;
using System.Globalization;
using Microsoft.Extensions.Logging.Abstractions;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;

namespace Vmm.Devices.Vfio.Probe;

/// <summary>Finds out what VFIO offers on this host, without a VM. Stateless; thread-safe.</summary>
public static class VfioProbe
{
    /// <summary>Size of a v1 migration region's header; a region must be larger to have room for data.</summary>
    private const ulong V1HeaderBytes = 32;

    /// <summary>Lists groups, devices and drivers. Opens nothing and needs no privilege.</summary>
    /// <returns>What the host has now.</returns>
    public static VfioHostReport Host() => Host(new VfioHostPaths());

    /// <summary>Opens a device, asks what it can do, and closes it. A device that is in use is refused; some drivers reset it on open and close.</summary>
    /// <param name="device">PCI address, UUID of a mediated device, or its folder in sysfs.</param>
    /// <returns>What the device can do, and why it could not migrate.</returns>
    /// <exception cref="ConfigurationException">The text names no device.</exception>
    /// <exception cref="VfioException">It cannot be opened, or an answer is malformed; the message says what and the hint what to do.</exception>
    public static VfioDeviceReport Device(string device) => Device(device, new VfioHostPaths(), new KernelVfio());

    internal static VfioHostReport Host(VfioHostPaths paths)
    {
        IEnumerable<string> groups = Directory.Exists(paths.Groups) ? Directory.EnumerateDirectories(paths.Groups).Select(static g => Path.GetFileName(g)) : [];
        return new VfioHostReport(File.Exists(paths.Container), File.Exists(paths.Iommufd),
        [
            .. groups.OrderBy(static g => int.TryParse(g, NumberStyles.None, CultureInfo.InvariantCulture, out int n) ? n : int.MaxValue)
                .SelectMany(g => Members(g, File.Exists(paths.Group(g)), Path.Combine(paths.Groups, g, "devices"))),
        ]);
    }

    internal static VfioDeviceReport Device(string device, VfioHostPaths paths, IVfioKernel kernel)
    {
        ArgumentNullException.ThrowIfNull(device);
        string path = Path.IsPathRooted(device) ? device.TrimEnd('/')
            : VfioDeviceChoice.PciPath(device, paths)
            ?? (Guid.TryParseExact(device, "D", out _) ? Path.Combine(paths.MediatedDevices, device)
            : throw new ConfigurationException($"'{device}' is no device: a PCI address, a mediated device's UUID or a folder in sysfs is expected"));
        using var memory = new GuestMemory();
        using var containers = new VfioContainers(memory, kernel, paths, NullLoggerFactory.Instance);
        using KernelVfioDeviceIo io = containers.Open(new VfioDeviceChoice(path, UseIommufd: null));
        return Report(io);
    }

    private static IEnumerable<VfioMemberReport> Members(string group, bool hasNode, string folder)
    {
        if (!Directory.Exists(folder)) yield break;
        foreach (string member in Directory.EnumerateFileSystemEntries(folder).Order(StringComparer.Ordinal))
        {
            // A device may disappear after it was listed.
            if (!Directory.Exists(member)) continue;
            VfioHostDevice device = VfioHostDevice.Read(member);
            yield return new VfioMemberReport(group, hasNode, device.Name, device.Driver, device.HasVfioDriver, device.CdevNumber is null ? null : device.VfioName);
        }
    }

    private static VfioDeviceReport Report(KernelVfioDeviceIo io)
    {
        List<VfioRegionInfo> regions = [];
        for (uint i = 0; i < io.Info.RegionCount; i++)
            if (io.GetRegionInfo(i) is { IsPresent: true } region) regions.Add(region);
        List<(uint, uint, VfioIrqInfoFlags)> irqs = [];
        for (uint i = 0; i < io.Info.IrqCount; i++)
            if (io.GetIrqInfo(i) is { Count: > 0 } irq) irqs.Add((i, irq.Count, irq.Flags));
        Errno probed = Read(io, VfioDeviceFeature.Migration, out ulong flags);
        var migration = (VfioMigrationFlags)flags;
        bool v1 = probed == Errno.ENOTTY && regions.Exists(static r => r is { Type: VfioPciRegion.MigrationType, Subtype: VfioPciRegion.MigrationSubtype, SizeBytes: > V1HeaderBytes });
        int protocol = migration.HasFlag(VfioMigrationFlags.StopCopy) ? 2 : v1 ? 1 : 0;
        bool logsDma = protocol == 2 && io.DeviceFeature(VfioDeviceFeature.DmaLoggingStart, VfioFeatureOp.Probe | VfioFeatureOp.Set, []) == Errno.None;
        List<string> blockers = [];
        if (protocol == 0) blockers.Add(probed switch
        {
            Errno.ENOTTY => "the device's driver in the kernel does not support migration",
            Errno.None => "the device's migration has no STOP_COPY",
            _ => $"the device does not tell whether it can migrate: {probed}",
        });
        else if (!logsDma && !io.Container.CanLogDirty) blockers.Add("neither the device nor the IOMMU logs DMA writes (enable-migration=on overrides that for protocol 2)");
        return new VfioDeviceReport
        {
            Name = io.Name, Container = io.Container.Name, IsPci = io.Info.IsPci, SupportsReset = io.Info.SupportsReset, Regions = regions, Irqs = irqs, Protocol = protocol, Migration = migration,
            States = [.. VfioStateArcs.States.Where(s => VfioStateArcs.IsSupported(s, migration)).Select(static s => s.ToEventName())],
            FoundIn = io.StateAtOpen?.ToEventName(),
            StateBytes = protocol == 2 && Read(io, VfioDeviceFeature.MigDataSize, out ulong bytes) == Errno.None ? bytes : null,
            CanLogDma = logsDma, ContainerCanLogDirty = io.Container.CanLogDirty, Blockers = blockers,
        };
    }

    private static Errno Read(KernelVfioDeviceIo io, VfioDeviceFeature feature, out ulong value)
    {
        byte[] data = new byte[sizeof(ulong)];
        Errno errno = io.DeviceFeature(feature, VfioFeatureOp.Get, data);
        value = BinaryPrimitives.ReadUInt64LittleEndian(data);
        return errno;
    }
}
