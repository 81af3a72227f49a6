using System.Text.Json;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Probe;
using Vmm.Tests.Fakes;
using Vmm.Tools.Cli;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

internal sealed class VfioCommandTests
{
    private static readonly VfioHostReport s_host = new(true, false,
        [new("7", true, "0000:00:01.0", "vfio-pci", true, "vfio0"), new("7", true, "0000:00:01.1", null, false, null)]);

    private static readonly VfioDeviceReport s_device = new()
    {
        Name = "0000:00:01.0", Container = "type1 container", IsPci = true, SupportsReset = true,
        Regions =
        [
            new VfioRegionInfo { Index = 0, SizeBytes = 0x4000, Flags = VfioRegionFlags.Read | VfioRegionFlags.Write | VfioRegionFlags.Mmap, Areas = [new(0x1000, 0x3000)] },
            new VfioRegionInfo { Index = 9, SizeBytes = 0x2000, Flags = VfioRegionFlags.Read, Type = 3, Subtype = 1 },
        ],
        Irqs = [(2, 4, VfioIrqInfoFlags.EventFd | VfioIrqInfoFlags.NoResize)],
        Protocol = 2, Migration = VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy, States = ["running", "stop-copy"],
        FoundIn = "pre-copy", StateBytes = 96, CanLogDma = false, Blockers = ["no log"],
    };

    [Test]
    public async Task The_host_is_a_table_or_json()
    {
        CliResult text = await Run("probe"), json = await Run("probe", "--json");
        Assert.That((text.Code, json.Code), Is.EqualTo((ExitCode.Ok, ExitCode.Ok)), text.Error + json.Error);
        Assert.That(text.Out, Does.Contain("/dev/vfio/vfio: yes, /dev/iommu: no").And.Match("7 +yes +0000:00:01.0 +vfio-pci +yes +vfio0").And.Match("7 +yes +0000:00:01.1 +- +no +-"));
        JsonElement device = JsonDocument.Parse(json.Out).RootElement.GetProperty("groups")[0].GetProperty("devices")[1];
        Assert.That((device.GetProperty("device").GetString(), device.GetProperty("driver").ValueKind), Is.EqualTo(("0000:00:01.1", JsonValueKind.Null)));
    }

    [Test]
    public async Task A_host_without_groups_is_told_what_to_do()
    {
        CliResult result = await Run(new VfioHostReport(false, false, []), "probe");
        Assert.That(result.Code, Is.EqualTo(ExitCode.Ok));
        Assert.That(result.Error, Does.Contain("no IOMMU groups").And.Contain("intel_iommu=on"));
    }

    [Test]
    public async Task A_device_is_a_table()
    {
        CliResult result = await Run("probe", "0000:00:01.0");
        Assert.That(result.Code, Is.EqualTo(ExitCode.Ok), result.Error);
        Assert.That(result.Out, Does.Match("region 0 +BAR0, 16 KiB, read write mmap, mapped: 0x1000\\+0x3000").And.Match("region 9 +migration, 8 KiB, read\n")
            .And.Match("irq 2 +MSI-X, 4 x eventfd noresize").And.Match("migration +protocol v2").And.Match("states +running stop-copy").And.Match("precopy +yes").And.Match("p2p +no")
            .And.Match("state size +96 B").And.Match("found in +pre-copy; it was reset").And.Match("dirty log +device no, IOMMU no").And.Match("blocked +no log"));
    }

    [Test]
    public async Task A_device_is_json()
    {
        CliResult result = await Run("probe", "0000:00:01.0", "--json");
        JsonElement root = JsonDocument.Parse(result.Out).RootElement;
        Assert.Multiple(() =>
        {
            Assert.That(root.GetProperty("device").GetString(), Is.EqualTo("0000:00:01.0"));
            Assert.That(root.GetProperty("protocol").GetInt32(), Is.EqualTo(2));
            Assert.That(root.GetProperty("states").EnumerateArray().Select(static s => s.GetString()), Is.EqualTo(new[] { "running", "stop-copy" }));
            Assert.That(root.GetProperty("regions")[0].GetProperty("areas")[0].GetProperty("offset").GetInt32(), Is.EqualTo(0x1000));
            Assert.That(root.GetProperty("irqs")[0].GetProperty("flags").EnumerateArray().Select(static s => s.GetString()), Is.EqualTo(new[] { "eventfd", "noresize" }));
            Assert.That(root.GetProperty("state-bytes").GetInt32(), Is.EqualTo(96));
            Assert.That(root.GetProperty("found-in").GetString(), Is.EqualTo("pre-copy"));
            Assert.That(root.GetProperty("blockers")[0].GetString(), Is.EqualTo("no log"));
        });
    }

    [Test]
    public async Task A_device_that_cannot_be_opened_is_one_line_with_its_hint()
    {
        CliResult result = await Run("probe", "gone");
        Assert.That((result.Code, result.Out, result.Error), Is.EqualTo((ExitCode.Failed, "", "vmm: gone: no such device (look)\n")));
    }

    private static Task<CliResult> Run(params string[] arguments) => Run(s_host, arguments);

    private static async Task<CliResult> Run(VfioHostReport host, params string[] arguments)
    {
        using var output = new StringWriter();
        using var error = new StringWriter();
        int code = await CliRoot.Invoke(["vfio", .. arguments], new CliContext
        {
            Out = output, Error = error, ProbeVfioHost = () => host,
            ProbeVfioDevice = static d => d == s_device.Name ? s_device : throw new VfioException($"{d}: no such device", Errno.ENODEV) { Hint = "look" },
        });
        return new CliResult((ExitCode)code, output.ToString(), error.ToString());
    }
}
