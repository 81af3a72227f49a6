using System.Globalization;
using System.Reflection;
using System.Runtime.InteropServices;
using System.Text.RegularExpressions;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Tests.Unit.Vfio;

/// <summary>One question to a C compiler: an expression, and the value that our code gives it.</summary>
internal sealed record UapiItem(string Name, string Expression, ulong Ours, string? Structure = null);

/// <summary>Everything that our code says about the kernel's headers. Reflection finds the items, so none is left out.</summary>
internal static partial class UapiItems
{
    /// <summary>Enums outside Uapi, with the C name of each member.</summary>
    private static readonly (Enum Ours, string C)[] s_enums =
    [
        (VfioDeviceState.Error, "VFIO_DEVICE_STATE_ERROR"), (VfioDeviceState.Stop, "VFIO_DEVICE_STATE_STOP"), (VfioDeviceState.Running, "VFIO_DEVICE_STATE_RUNNING"),
        (VfioDeviceState.StopCopy, "VFIO_DEVICE_STATE_STOP_COPY"), (VfioDeviceState.Resuming, "VFIO_DEVICE_STATE_RESUMING"),
        (VfioDeviceState.RunningP2P, "VFIO_DEVICE_STATE_RUNNING_P2P"), (VfioDeviceState.PreCopy, "VFIO_DEVICE_STATE_PRE_COPY"),
        (VfioDeviceState.PreCopyP2P, "VFIO_DEVICE_STATE_PRE_COPY_P2P"),
        (VfioMigrationFlags.StopCopy, "VFIO_MIGRATION_STOP_COPY"), (VfioMigrationFlags.P2P, "VFIO_MIGRATION_P2P"), (VfioMigrationFlags.PreCopy, "VFIO_MIGRATION_PRE_COPY"),
        (VfioDeviceFeature.Migration, "VFIO_DEVICE_FEATURE_MIGRATION"), (VfioDeviceFeature.MigDeviceState, "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE"),
        (VfioDeviceFeature.DmaLoggingStart, "VFIO_DEVICE_FEATURE_DMA_LOGGING_START"), (VfioDeviceFeature.DmaLoggingStop, "VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP"),
        (VfioDeviceFeature.DmaLoggingReport, "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT"), (VfioDeviceFeature.MigDataSize, "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE"),
        (VfioDeviceFeature.MigPrecopyInfoV2, "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2"),
        (VfioFeatureOp.Get, "VFIO_DEVICE_FEATURE_GET"), (VfioFeatureOp.Set, "VFIO_DEVICE_FEATURE_SET"), (VfioFeatureOp.Probe, "VFIO_DEVICE_FEATURE_PROBE"),
        (VfioRegionFlags.Read, "VFIO_REGION_INFO_FLAG_READ"), (VfioRegionFlags.Write, "VFIO_REGION_INFO_FLAG_WRITE"), (VfioRegionFlags.Mmap, "VFIO_REGION_INFO_FLAG_MMAP"),
        (VfioIrqInfoFlags.EventFd, "VFIO_IRQ_INFO_EVENTFD"), (VfioIrqInfoFlags.Maskable, "VFIO_IRQ_INFO_MASKABLE"),
        (VfioIrqInfoFlags.AutoMasked, "VFIO_IRQ_INFO_AUTOMASKED"), (VfioIrqInfoFlags.NoResize, "VFIO_IRQ_INFO_NORESIZE"),
        (VfioIrqSetFlags.DataNone, "VFIO_IRQ_SET_DATA_NONE"), (VfioIrqSetFlags.DataBool, "VFIO_IRQ_SET_DATA_BOOL"), (VfioIrqSetFlags.DataEventFd, "VFIO_IRQ_SET_DATA_EVENTFD"),
        (VfioIrqSetFlags.ActionMask, "VFIO_IRQ_SET_ACTION_MASK"), (VfioIrqSetFlags.ActionUnmask, "VFIO_IRQ_SET_ACTION_UNMASK"),
        (VfioIrqSetFlags.ActionTrigger, "VFIO_IRQ_SET_ACTION_TRIGGER"),
    ];

    private static readonly (string Constant, string C)[] s_pci =
    [
        (nameof(VfioPciRegion.Bar0), "VFIO_PCI_BAR0_REGION_INDEX"), (nameof(VfioPciRegion.Rom), "VFIO_PCI_ROM_REGION_INDEX"),
        (nameof(VfioPciRegion.Config), "VFIO_PCI_CONFIG_REGION_INDEX"), (nameof(VfioPciRegion.Vga), "VFIO_PCI_VGA_REGION_INDEX"),
        (nameof(VfioPciRegion.FirstDeviceSpecific), "VFIO_PCI_NUM_REGIONS"), (nameof(VfioPciRegion.MigrationType), "VFIO_REGION_TYPE_MIGRATION_DEPRECATED"),
        (nameof(VfioPciRegion.MigrationSubtype), "VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED"),
        (nameof(VfioPciIrq.Intx), "VFIO_PCI_INTX_IRQ_INDEX"), (nameof(VfioPciIrq.Msi), "VFIO_PCI_MSI_IRQ_INDEX"), (nameof(VfioPciIrq.Msix), "VFIO_PCI_MSIX_IRQ_INDEX"),
        (nameof(VfioPciIrq.Err), "VFIO_PCI_ERR_IRQ_INDEX"), (nameof(VfioPciIrq.Req), "VFIO_PCI_REQ_IRQ_INDEX"),
    ];

    /// <summary>All items: constants, enum members, then structures with their fields.</summary>
    internal static List<UapiItem> All()
    {
        List<UapiItem> items = [];
        foreach ((Type holder, string prefix) in new[] { (typeof(VfioUapi), "vfio_"), (typeof(IommufdUapi), "iommu_") })
            items.AddRange(Of(holder, prefix, static _ => true));
        items.AddRange(s_enums.Select(static e => new UapiItem(e.C, e.C, Convert.ToUInt64(e.Ours, CultureInfo.InvariantCulture))));
        FieldInfo[] pci = [.. Constants(typeof(VfioPciRegion)), .. Constants(typeof(VfioPciIrq))];
        items.AddRange(s_pci.Select(p => new UapiItem(p.C, p.C, Value(pci.Single(f => f.Name == p.Constant)))));
        return [.. items.DistinctBy(static i => i.Name)];
    }

    /// <summary>The constants and structures that one type holds.</summary>
    internal static IEnumerable<UapiItem> Of(Type holder, string prefix, Func<FieldInfo, bool> isNumber) =>
    [
        .. Constants(holder).Where(isNumber).Select(static f => new UapiItem(f.Name, f.Name, Value(f))),
        .. holder.GetNestedTypes(BindingFlags.NonPublic).Where(static t => t.IsValueType && !t.IsDefined(typeof(System.Runtime.CompilerServices.CompilerGeneratedAttribute)) && !t.Name.Contains('<')).SelectMany(t => Layout(t, prefix)),
    ];

    /// <summary>Members of the enums and constants above that have no row.</summary>
    internal static IEnumerable<string> Unlisted()
    {
        foreach (Type type in s_enums.Select(static e => e.Ours.GetType()).Distinct())
            foreach (Enum value in Enum.GetValuesAsUnderlyingType(type).Cast<object>().Select(v => (Enum)Enum.ToObject(type, v)))
                if (!s_enums.Any(e => e.Ours.Equals(value)) && value.ToString() != "None") yield return $"{type.Name}.{value}";
        foreach (Type type in new[] { typeof(VfioPciRegion), typeof(VfioPciIrq) })
            foreach (FieldInfo field in Constants(type).Where(static f => !s_pci.Any(p => p.Constant == f.Name))) yield return $"{type.Name}.{field.Name}";
    }

    private static IEnumerable<UapiItem> Layout(Type structure, string prefix)
    {
        string c = "struct " + prefix + Snake(structure.Name);
        yield return new UapiItem($"sizeof({c})", $"sizeof({c})", (ulong)Marshal.SizeOf(structure), c);
        foreach (FieldInfo field in structure.GetFields(BindingFlags.Instance | BindingFlags.NonPublic).Where(static f => !f.Name.StartsWith("Reserved", StringComparison.Ordinal)))
        {
            string name = Snake(field.Name);
            yield return new UapiItem($"offsetof({c}, {name})", $"offsetof({c}, {name})", (ulong)Marshal.OffsetOf(structure, field.Name), c);
            if (!field.FieldType.IsPrimitive) continue;
            yield return new UapiItem($"sizeof({c}.{name})", $"sizeof((({c} *)0)->{name})", (ulong)Marshal.SizeOf(field.FieldType), c);
        }
    }

    private static IEnumerable<FieldInfo> Constants(Type type) =>
        type.GetFields(BindingFlags.Static | BindingFlags.Public | BindingFlags.NonPublic | BindingFlags.DeclaredOnly).Where(static f => f.IsLiteral);

    private static ulong Value(FieldInfo field) => Convert.ToUInt64(field.GetRawConstantValue(), CultureInfo.InvariantCulture);

    private static string Snake(string name) => Words().Replace(name, "_$0").ToLowerInvariant();

    [GeneratedRegex("(?<!^)[A-Z]")]
    private static partial Regex Words();
}
