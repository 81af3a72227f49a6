using System.Text.Json.Nodes;
using Vmm.Core.Devices;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Device;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Migration.Viewer;
using Vmm.Tests.Support;

namespace Vmm.Tests.Lab;

/// <summary>
/// Migration of a real mtty to and from QEMU 11.1. QEMU's machine <c>x-remote</c> has only a PCI bus, so our VM can have the same sections:
/// <c>timer</c>, <c>PCIHost</c>, <c>PCIBUS</c> with 256 lines, and the device. There is no RAM.
/// </summary>
[TestFixture(false, TestName = "Qemu(group)")]
[TestFixture(true, TestName = "Qemu(iommufd)")]
public sealed class LabQemuTests(bool iommufd) : LabFixture
{
    private const string Version = "11.1";

    [Test]
    public async Task Spec4_MttyMovesFromQemuToVmmAndBack([Values] bool returnPath)
    {
        byte[] expected = With(LabVfio.Mtty1, Uart.Change);
        using (QemuProcess qemu = Qemu(LabVfio.Mtty1))
        using (TestVm vm = Vm(LabVfio.Mtty2, incoming: true))
        {
            if (returnPath) qemu.SetCapability("return-path", true);
            await FromQemu(qemu, vm);
            IVfioDeviceIo device = vm.Vm.Devices.OfType<VfioPciDevice>().Single().Io;
            Assert.That(Uart.Observe(device), Is.EqualTo(expected), "after the first hop");
            expected = Uart.Change(device);
        }
        // mtty keeps its registers and FIFOs while no process has it open.
        using (QemuProcess qemu = Qemu(LabVfio.Mtty1, "-incoming", "defer"))
        using (TestVm vm = Vm(LabVfio.Mtty2, incoming: false))
        {
            if (returnPath) vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
            await ToQemu(vm, qemu);
        }
        Assert.That(With(LabVfio.Mtty1, Uart.Observe), Is.EqualTo(expected), "after the second hop");
    }

    [Test]
    public async Task Spec4_TheUartSurvivesBothHopsOfOneMachine()
    {
        byte[] expected = With(LabVfio.Mtty1, Uart.Change);
        using TestVm vm = Vm(LabVfio.Mtty2, incoming: true);
        using (QemuProcess qemu = Qemu(LabVfio.Mtty1))
        {
            await FromQemu(qemu, vm);
        }
        // Overwrite the device's state, because the first hop left the expected state in it.
        Assert.That(With(LabVfio.Mtty1, static d => Uart.Change(d, 0x11)), Is.Not.EqualTo(expected));
        using (QemuProcess qemu = Qemu(LabVfio.Mtty1, "-incoming", "defer"))
        {
            await ToQemu(vm, qemu);
        }
        Assert.That(With(LabVfio.Mtty1, Uart.Observe), Is.EqualTo(expected), "after both hops");
    }

    [Test]
    public async Task Spec3_7_TheFinalStateGoesOverMultifdFromQemuAndToQemu()
    {
        byte[] expected = With(LabVfio.Mtty1, Uart.Change);
        using TestVm vm = Vm(LabVfio.Mtty2, incoming: true);
        vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true), new(MigrationCapability.Multifd, true)]);
        using (QemuProcess qemu = Qemu(LabVfio.Mtty1))
        {
            qemu.SetCapability("multifd", true);
            qemu.SetCapability("return-path", true);
            await FromQemu(qemu, vm);
        }
        Assert.That(With(LabVfio.Mtty1, static d => Uart.Change(d, 0x11)), Is.Not.EqualTo(expected));
        using (QemuProcess qemu = Qemu(LabVfio.Mtty1, "-incoming", "defer"))
        {
            qemu.SetCapability("multifd", true);
            await ToQemu(vm, qemu);
            Assert.That(vm.Engine.Query().Ram!.MultifdBytes, Is.Positive);
        }
        Assert.That(With(LabVfio.Mtty1, Uart.Observe), Is.EqualTo(expected));
    }

    [Test]
    public async Task Spec4_OurRecordsAreThoseOfQemu()
    {
        using var folder = new TempDirectory();
        byte[] expected = With(LabVfio.Mtty1, Uart.Change);
        using (QemuProcess qemu = Qemu(LabVfio.Mtty1))
        {
            qemu.Run("migrate", new JsonObject { ["uri"] = $"file:{folder["qemu"]}" });
            Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        }
        using (TestVm vm = Vm(LabVfio.Mtty2, incoming: true))
        {
            Assert.That(await vm.Engine.MigrateIncoming(MigrationAddress.Parse($"file:{folder["qemu"]}")).WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
            Assert.That(await vm.Engine.Migrate(MigrationAddress.Parse($"file:{folder["vmm"]}")).WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        }
        Assert.That(With(LabVfio.Mtty2, Uart.Observe), Is.EqualTo(expected));
        (List<string> theirs, List<string> ours) = (Records(folder["qemu"]), Records(folder["vmm"]));
        foreach (string line in ours) TestContext.Out.WriteLine(line);
        Assert.That(ours, Is.EqualTo(theirs));
        Assert.That(ours, Has.Count.GreaterThanOrEqualTo(7), "records: SETUP, data of PRE_COPY and STOP_COPY, their ends, config");
    }

    private static async Task FromQemu(QemuProcess qemu, TestVm vm)
    {
        Task<MigrationStatus> incoming = vm.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        qemu.Run("migrate", new JsonObject { ["uri"] = $"tcp:127.0.0.1:{vm.Engine.Query().SocketAddresses[0].Port}" });
        Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error} {qemu.Errors}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
    }

    private static async Task ToQemu(TestVm vm, QemuProcess qemu)
    {
        MigrationStatus status = await vm.Engine.Migrate(MigrationAddress.Parse(qemu.Listen("tcp:127.0.0.1:0"))).WaitAsync(QemuProcess.Deadline);
        Assert.That(status, Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error} {qemu.Errors}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
    }

    /// <summary>The VFIO records of a stream file, each as text with its section and its bytes.</summary>
    private static List<string> Records(string path)
    {
        StreamDocument document = StreamViewer.ReadFile(path);
        Assert.That(document.IsValid, string.Join('\n', document.Findings));
        byte[] bytes = File.ReadAllBytes(path);
        // The count of PART sections without data depends on timing, so leave them out.
        return [.. from entry in document.Entries
                   where entry.Name?.EndsWith("/vfio", StringComparison.Ordinal) == true && !(entry.Kind == StreamEntryKind.Part && entry.Fields.Count == 1)
                   from field in entry.Fields
                   select $"{entry.Kind} {entry.Name}/{entry.InstanceId} v{entry.VersionId} {field.Name} {Convert.ToHexStringLower(bytes.AsSpan((int)field.Offset, (int)field.Length))}"];
    }

    // Device dirty tracking is off, because this VM has no RAM and drivers refuse a log without ranges.
    private static TestVm Vm(string path, bool incoming) => new(
        new VmOptions { Machine = global::Vmm.Core.Devices.Vm.RemoteMachine, IsIncoming = incoming, Devices = [DeviceOptions.Parse($"vfio-pci,id=v0,addr=2,sysfsdev={path},enable-migration=on,x-device-dirty-page-tracking=off")] },
        static b => b.AddPlugin<VfioPlugin>());

    private QemuProcess Qemu(string path, params string[] extra) => QemuProcess.WithMachine(Version, ["-M", global::Vmm.Core.Devices.Vm.RemoteMachine],
        ["-device", $"vfio-pci,id=v0,addr=2,sysfsdev={path},enable-migration=on,x-device-dirty-page-tracking=off{(iommufd ? ",iommufd=i0" : "")}", .. iommufd ? (string[])["-object", "iommufd,id=i0"] : [], .. extra]);

    /// <summary>Uses a device while no VM has it.</summary>
    private byte[] With(string path, Func<IVfioDeviceIo, byte[]> work)
    {
        using var lab = new LabVfio();
        return work(lab.Open(path, iommufd));
    }
}
