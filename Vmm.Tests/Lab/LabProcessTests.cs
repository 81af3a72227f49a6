using System.Text.Json.Nodes;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Client;

namespace Vmm.Tests.Lab;

/// <summary>Two <c>vmm</c> processes with real devices migrate over TCP. The tests use QMP, because each <c>vmm</c> command would start slowly here.</summary>
[TestFixture(TestName = "Processes")]
[Category(Slow)]
public sealed class LabProcessTests : LabFixture
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(120);

    [TestCase(false)]
    [TestCase(true)]
    public async Task Spec3_MttyMovesFromProcessToProcess(bool iommufd)
    {
        byte[] expected = With(iommufd, LabVfio.Mtty1, Uart.Change);
        await Move(iommufd, [LabVfio.Mtty1], [LabVfio.Mtty2]);
        Assert.That(With(iommufd, LabVfio.Mtty2, Uart.Observe), Is.EqualTo(expected));
    }

    [Test]
    public async Task Spec3_TwoDevicesOfDifferentKindsMoveTogether()
    {
        const bool iommufd = true;
        using LabDevice source = new("v2"), destination = new("v2");
        // An emulated IOMMU has no dirty log under iommufd, so the device needs one: without any log all RAM stays dirty.
        (source["dma_log"], destination["dma_log"]) = (1, 1);
        byte[] first = With(iommufd, LabVfio.Mtty1, Uart.Change), second = With(iommufd, source.Path, static d => LabMemory.Fill(d, 2));
        await Move(iommufd, [LabVfio.Mtty1, source.Path], [LabVfio.Mtty2, destination.Path]);
        Assert.That((With(iommufd, LabVfio.Mtty2, Uart.Observe), With(iommufd, destination.Path, LabMemory.Read)), Is.EqualTo((first, second)));
    }

    [Test]
    public async Task Spec5_4_AV1DeviceMovesIntoASmallerSection()
    {
        const bool iommufd = false; // Protocol v1 works with the dirty log of type1 only.
        using LabDevice source = new("v1"), destination = new("v1");
        destination["data_section_bytes"] = 40;
        byte[] expected = With(iommufd, source.Path, static d => LabMemory.Fill(d, 3));
        await Move(iommufd, [source.Path], [destination.Path]);
        Assert.That(With(iommufd, destination.Path, LabMemory.Read), Is.EqualTo(expected));
    }

    private static async Task Move(bool iommufd, string[] source, string[] destination)
    {
        await using var vmm = new VmmCommands { StartDeadline = s_deadline };
        PeerProcess from = await vmm.StartVmOf("from", "16M", Devices(iommufd, source)), to = await vmm.StartVmOf("to", "16M", [.. Devices(iommufd, destination), "--incoming", "tcp:127.0.0.1:0"]);
        await from.Monitor.Execute("migrate", new JsonObject { ["uri"] = to.IncomingUri }, CancellationToken.None);
        long deadline = Environment.TickCount64 + (long)s_deadline.TotalMilliseconds;
        string? status;
        do status = (await from.Monitor.Execute("query-migrate", null, CancellationToken.None))!["status"]?.ToString();
        while (status is not ("completed" or "failed" or "cancelled") && Environment.TickCount64 < deadline);
        Assert.That(status, Is.EqualTo("completed"), $"{from.Errors} {to.Errors}");
        // Without a return path the source completes before the destination has loaded.
        string state;
        do state = await vmm.State(to);
        while (state == "inmigrate" && Environment.TickCount64 < deadline);
        Assert.That((await vmm.State(from), state), Is.EqualTo(("postmigrate", "running")), to.Errors);
    }

    private static string[] Devices(bool iommufd, string[] paths) =>
        [.. paths.SelectMany((path, i) => (string[])["--device", $"vfio-pci,id=d{i},addr={i + 2},sysfsdev={path},enable-migration=on,iommufd={(iommufd ? "on" : "off")}"])];

    /// <summary>Uses a device while no VM has it.</summary>
    private static byte[] With(bool iommufd, string path, Func<IVfioDeviceIo, byte[]> work)
    {
        using var lab = new LabVfio();
        return work(lab.Open(path, iommufd));
    }
}
