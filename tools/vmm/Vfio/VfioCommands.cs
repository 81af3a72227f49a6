using System.Globalization;
using System.Text.Json.Nodes;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Probe;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Vfio;

/// <summary><c>vmm vfio probe</c>: shows the VFIO support of this host and its devices, without a VM.</summary>
internal sealed class VfioCommands(CliContext context)
{
    private static readonly string[] s_irqs = ["INTx", "MSI", "MSI-X", "ERR", "REQ"];

    public ExitCode Probe(string? device, bool json)
    {
        if (device is null) Host(context.ProbeVfioHost(), json);
        else Device(context.ProbeVfioDevice(device), json);
        return ExitCode.Ok;
    }

    private void Host(VfioHostReport host, bool json)
    {
        if (json)
        {
            Format.WriteJson(context.Out, new JsonObject
            {
                ["container"] = host.HasContainerNode, ["iommufd"] = host.HasIommufdNode,
                ["groups"] = new JsonArray([.. host.Devices.GroupBy(static d => (d.Group, d.HasGroupNode)).Select(static g => new JsonObject
                {
                    ["group"] = g.Key.Group, ["node"] = g.Key.HasGroupNode,
                    ["devices"] = new JsonArray([.. g.Select(static m => new JsonObject
                    {
                        ["device"] = m.Name, ["driver"] = m.Driver, ["vfio"] = m.IsVfio, ["character-device"] = m.CharacterDevice,
                    })]),
                })]),
            });
            return;
        }
        context.Out.WriteLine($"/dev/vfio/vfio: {(host.HasContainerNode ? "yes" : "no")}, /dev/iommu: {(host.HasIommufdNode ? "yes" : "no")}");
        if (host.Devices.Count == 0)
        {
            context.Note("there are no IOMMU groups (switch the IOMMU on in the firmware and in the kernel: intel_iommu=on; AMD needs no parameter)");
            return;
        }
        Format.WriteTable(context.Out,
        [
            ["GROUP", "NODE", "DEVICE", "DRIVER", "VFIO", "CDEV"],
            .. host.Devices.Select(static m =>
                (string[])[m.Group, m.HasGroupNode ? "yes" : "no", m.Name, m.Driver ?? "-", m.IsVfio ? "yes" : "no", m.CharacterDevice ?? "-"]),
        ]);
    }

    private void Device(VfioDeviceReport device, bool json)
    {
        if (json)
        {
            Format.WriteJson(context.Out, new JsonObject
            {
                ["device"] = device.Name, ["container"] = device.Container, ["pci"] = device.IsPci, ["reset"] = device.SupportsReset,
                ["regions"] = new JsonArray([.. device.Regions.Select(RegionJson)]),
                ["irqs"] = new JsonArray([.. device.Irqs.Select(static i => new JsonObject { ["index"] = i.Index, ["count"] = i.Count, ["flags"] = Flags(i.Flags) })]),
                ["protocol"] = device.Protocol,
                ["states"] = new JsonArray([.. device.States.Select(static s => JsonValue.Create(s))]),
                ["found-in"] = device.FoundIn,
                ["precopy"] = device.Migration.HasFlag(VfioMigrationFlags.PreCopy), ["p2p"] = device.Migration.HasFlag(VfioMigrationFlags.P2P),
                ["device-dirty-log"] = device.CanLogDma, ["iommu-dirty-log"] = device.ContainerCanLogDirty, ["state-bytes"] = device.StateBytes,
                ["blockers"] = new JsonArray([.. device.Blockers.Select(static b => JsonValue.Create(b))]),
            });
            return;
        }
        bool v2 = device.Protocol == 2;
        Format.WriteTable(context.Out,
        [
            ["device", device.Name],
            ["container", device.Container],
            ["kind", $"{(device.IsPci ? "PCI" : "not PCI")}, reset {(device.SupportsReset ? "supported" : "not announced")}"],
            .. device.Regions.Select(static r => (string[])[$"region {r.Index}", RegionText(r)]),
            .. device.Irqs.Select(static i => (string[])[$"irq {i.Index}", $"{(i.Index < s_irqs.Length ? s_irqs[i.Index] : "other")}, {i.Count} x {string.Join(' ', Flags(i.Flags))}"]),
            ["migration", device.Protocol == 0 ? "none" : $"protocol v{device.Protocol}"],
            .. v2 ? (string[][])
            [
                ["states", string.Join(' ', device.States)],
                ["precopy", YesNo(device.Migration.HasFlag(VfioMigrationFlags.PreCopy))],
                ["p2p", YesNo(device.Migration.HasFlag(VfioMigrationFlags.P2P))],
                ["state size", device.StateBytes is { } bytes ? Format.Size(bytes) : "unknown"],
            ] : [],
            .. device.FoundIn is { } found ? (string[][])[["found in", found == "running" ? found : $"{found}; it was reset"]] : [],
            ["dirty log", $"device {YesNo(device.CanLogDma)}, IOMMU {YesNo(device.ContainerCanLogDirty)}"],
            .. device.Blockers.Select(static b => (string[])["blocked", b]),
        ]);
    }

    private static string YesNo(bool value) => value ? "yes" : "no";

    private static JsonObject RegionJson(VfioRegionInfo r) => new()
    {
        ["index"] = r.Index, ["name"] = RegionName(r), ["size"] = r.SizeBytes, ["flags"] = Flags(r.Flags),
        ["areas"] = new JsonArray([.. r.Areas.Select(static a => new JsonObject { ["offset"] = a.OffsetBytes, ["size"] = a.SizeBytes })]),
    };

    private static string RegionText(VfioRegionInfo r)
    {
        string areas = r.Areas.Count == 0 ? string.Empty : $", mapped: {string.Join(' ', r.Areas.Select(static a => string.Create(CultureInfo.InvariantCulture, $"0x{a.OffsetBytes:x}+0x{a.SizeBytes:x}")))}";
        return $"{RegionName(r)}, {Format.Size(r.SizeBytes)}, {string.Join(' ', Flags(r.Flags))}{areas}";
    }

    private static string RegionName(VfioRegionInfo r) => r.Index switch
    {
        < VfioPciRegion.Rom => $"BAR{r.Index}",
        VfioPciRegion.Rom => "ROM",
        VfioPciRegion.Config => "config",
        VfioPciRegion.Vga => "VGA",
        _ => r is { Type: VfioPciRegion.MigrationType, Subtype: VfioPciRegion.MigrationSubtype } ? "migration" : $"type {r.Type}/{r.Subtype}",
    };

    private static JsonArray Flags<T>(T flags) where T : struct, Enum =>
        [.. flags.ToString().ToLowerInvariant().Split(", ").Where(static f => f != "none").Select(static f => JsonValue.Create(f))];
}
