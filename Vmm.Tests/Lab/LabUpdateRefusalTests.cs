using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Lab;

/// <summary>Devices that cannot change process: an update fails with the reason and the VM runs on; other migration modes work (vfio-migration 7.5).</summary>
[TestFixture]
[Category(Slow)]
public sealed class LabUpdateRefusalTests : LabFixture
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(240);

    private static IEnumerable<TestCaseData> Devices()
    {
        yield return new TestCaseData($"sysfsdev={LabVfio.Mtty1},iommufd=off,enable-migration=on", "mediated device", "emulated IOMMU cannot suspend").SetArgDisplayNames("mdev, group");
        yield return new TestCaseData($"sysfsdev={LabVfio.Mtty1},iommufd=on,enable-migration=on", "mediated device", "emulated IOMMU cannot suspend").SetArgDisplayNames("mdev, iommufd");
    }

    [TestCaseSource(nameof(Devices))]
    public async Task Spec7_5_AMediatedDeviceIsRefusedWithTheReasonAndOtherModesAreNot(string device, string reason, string more)
    {
        await using var vmm = new VmmCommands { StartDeadline = s_deadline, CommandDeadline = s_deadline };
        PeerProcess vm = await vmm.StartVmOf("a", "1M,id=ram", "--device", $"vfio-pci,id=dev0,addr=2,{device}");
        await Refused(vmm, vm, ["update", "--vm", "a"], reason, more);
        await Refused(vmm, vm, ["update", "--vm", "a", "--exec"], reason, more);
        await Refused(vmm, vm, ["migrate", "--vm", "a", "--to", $"file:{vmm["reboot"]}", "--set", "mode=cpr-reboot"], "dev0", "suspended");
        await vmm.Ok("migrate", "--vm", "a", "--to", $"file:{vmm["state"]}", "--set", "mode=normal");
    }

    [Test]
    public async Task Spec7_5_AnIommufdDeviceIsRefusedForWhatTheKernelLacks()
    {
        await using var vmm = new VmmCommands { StartDeadline = s_deadline, CommandDeadline = s_deadline };
        PeerProcess vm = await vmm.StartVmOf("a", "1M,id=ram", "--device", $"vfio-pci,id=dev0,sysfsdev={LabVfio.Edu},iommufd=on");
        await Refused(vmm, vm, ["update", "--vm", "a"], "IOMMU_IOAS_CHANGE_PROCESS", "iommufd=off");
    }

    private static async Task Refused(VmmCommands vmm, PeerProcess vm, string[] command, params string[] reasons)
    {
        CliResult result = await vmm.Run(command);
        Assert.That(result.Code, Is.Not.EqualTo(ExitCode.Ok));
        foreach (string reason in reasons) Assert.That(result.Error, Does.Contain(reason));
        Assert.That(await vmm.State(vm), Is.EqualTo("running"), vm.Errors);
    }
}
