using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

/// <summary>A hosted device with everything that outlives a client: its FSM, its maps and interrupts, and a quiesce that has not completed yet.</summary>
internal sealed class VfioUserDevice : IDisposable
{
    /// <summary>Regions of a PCI device, VGA included; the v1 migration region comes behind them.</summary>
    internal const uint PciRegionCount = 9;

    private readonly VfioUserRegion?[] _regions = new VfioUserRegion?[PciRegionCount];

    internal VfioUserDevice(IVfioUserBackend backend, VfioUserServerOptions options)
    {
        Backend = backend;
        Options = options;
        foreach (VfioUserRegion region in backend.Regions)
        {
            Check(region);
            _regions[region.Index] = region;
        }
        Dma = new DmaMap(options.MaxDmaMaps, options.MapClientMemory, options.MapOnlySealed);
        Irqs = new VfioUserIrqs(backend);
        Fsm = new VfioUserFsm(backend, Dma);
        backend.Realize(new VfioUserHost(Dma, Irqs, () => Fsm.State, options.Logger));
    }

    internal IVfioUserBackend Backend { get; }

    internal VfioUserServerOptions Options { get; }

    internal DmaMap Dma { get; }

    internal VfioUserIrqs Irqs { get; }

    internal VfioUserFsm Fsm { get; }

    internal VfioUserServerStats Stats { get; } = new();

    /// <summary>A quiesce that took longer than its request could wait; null otherwise.</summary>
    internal Task<Errno>? LateQuiesce { get; set; }

    /// <summary>A change of the migration state, or a reset, that took longer than its request could wait; null otherwise.</summary>
    internal Task<Errno>? LateStep { get; set; }

    internal uint RegionCount => Options.LegacyMigrationRegion && Fsm.IsMigratable ? PciRegionCount + 1 : PciRegionCount;

    internal VfioUserRegion? Region(uint index) => index < PciRegionCount ? _regions[index] : null;

    /// <summary>Closes maps and interrupts; whoever made the backend disposes it.</summary>
    public void Dispose()
    {
        Fsm.Dispose();
        Dma.Clear();
        Irqs.Dispose();
    }

    private void Check(VfioUserRegion region)
    {
        if (region.Index >= PciRegionCount || region.SizeBytes == 0 || _regions[region.Index] is not null)
            throw new ConfigurationException($"device '{Backend.TypeName}': region {region.Index} of {region.SizeBytes} bytes");
        if (region.Areas.Count > VfioUserLimits.SparseAreas || (region.Areas.Count > 0 && region.Memory is null))
            throw new ConfigurationException($"device '{Backend.TypeName}': region {region.Index} has {region.Areas.Count} areas");
        ulong limit = Math.Min(region.SizeBytes, region.Memory?.SizeBytes ?? 0);
        foreach (VfioRegionArea area in region.Areas)
        {
            bool ok = area.SizeBytes > 0 && (area.OffsetBytes | area.SizeBytes) % VfioUserLimits.PageBytes == 0 && area.OffsetBytes < limit && area.SizeBytes <= limit - area.OffsetBytes;
            if (!ok) throw new ConfigurationException($"device '{Backend.TypeName}': region {region.Index}: area {area.OffsetBytes:x}+{area.SizeBytes:x} is not whole pages of its memory");
        }
        if (region.Memory is { } memory && region.Areas.Count == 0 && memory.SizeBytes < region.SizeBytes)
            throw new ConfigurationException($"device '{Backend.TypeName}': region {region.Index} is larger than its memory");
    }
}
