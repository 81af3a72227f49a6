using System.Text.Json.Nodes;
using System.Text.RegularExpressions;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Client;

namespace Vmm.Tests.Lab;

/// <summary>Devices of the lab's kernel in a Linux guest of <c>vmm</c>: a PCI device with interrupts and DMA, and an mtty that migrates.</summary>
[TestFixture]
[Category(Slow)]
public sealed class LabLinuxDeviceTests : LabFixture
{
    private const string Memory = "160M";
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(180);

    [TestCase(false, TestName = "AnEmulatedPciDeviceWorksInTheGuest(intx)")]
    [TestCase(true, TestName = "AnEmulatedPciDeviceWorksInTheGuest(msi)")]
    public async Task AnEmulatedPciDeviceWorksInTheGuest(bool msi)
    {
        await using var vmm = new VmmCommands { StartDeadline = s_deadline };
        LinuxGuest.WriteInitrd(vmm["initrd"], $"insmod /m/vmm_edu.ko msi={(msi ? 1 : 0)}; grep edu /proc/interrupts; dmesg | grep EDU; echo DONE", "vmm_edu");
        string edu = LabVfio.Edu;
        PeerProcess vm = await vmm.StartVmOf("vm", Memory, [.. LinuxGuest.Boot(vmm), "--device", $"serial,output={vmm["console"]}", "--device", $"vfio-pci,id=edu,sysfsdev={edu}"]);
        await vm.Monitor.Execute("cont", null, CancellationToken.None);
        string console = await LinuxGuest.WaitFor(vmm["console"], "\nDONE", s_deadline);
        string[] checks = [.. Regex.Matches(console, @"EDU (\S+) (ok|FAILED) \S+\n").Select(static m => $"{m.Groups[1]} {m.Groups[2]}")];
        TestContext.Out.WriteLine(LinuxGuest.Tail(console));
        string irq = msi ? "msi ok" : "intx ok";
        Assert.That(checks.Distinct(), Is.EquivalentTo((string[])["id ok", "inverts ok", irq, "dma-from-memory ok", "dma-to-memory ok", "dma-content ok"]), LinuxGuest.Tail(console));
    }

    [Test]
    public async Task AnMttyKeepsTheGuestsBytesOverAMigration()
    {
        await using var vmm = new VmmCommands { StartDeadline = s_deadline };
        LinuxGuest.WriteInitrd(vmm["initrd"], """
            tty=/dev/$(dmesg | sed -n 's/.*0000:00:0.\.0: \(ttyS[0-9]*\) at.*/\1/p' | head -n 1); echo "TTY $tty"
            stty -F $tty raw -echo; exec 3<>$tty
            printf before >&3; echo SENT
            i=0; while [ $i -lt 120 ]; do echo "BEAT $i"; i=$((i+1)); usleep 100000; done
            echo "KEPT $(dd bs=1 count=6 <&3 2>/dev/null)"
            printf behind >&3; echo "AGAIN $(dd bs=1 count=6 <&3 2>/dev/null)"
            grep ttyS /proc/interrupts; dmesg | tail -n 20
            """);
        PeerProcess to = await vmm.StartVmOf("to", Memory, "--accel", "kvm", "--incoming", "tcp:127.0.0.1:0", "--device", $"serial,output={vmm["second"]}", "--device", Mtty(LabVfio.Mtty2));
        PeerProcess from = await vmm.StartVmOf("from", Memory, [.. LinuxGuest.Boot(vmm), "--device", $"serial,output={vmm["first"]}", "--device", Mtty(LabVfio.Mtty1)]);
        await from.Monitor.Execute("cont", null, CancellationToken.None);
        await LinuxGuest.WaitFor(vmm["first"], "BEAT 5\n", s_deadline);
        await from.Monitor.Execute("migrate", new JsonObject { ["uri"] = to.IncomingUri }, CancellationToken.None);
        await LinuxGuest.WaitFor(vmm["second"], "Power down", s_deadline);
        string all = LinuxGuest.Read(vmm["first"]) + LinuxGuest.Read(vmm["second"]);
        TestContext.Out.WriteLine(LinuxGuest.Tail(all));
        Assert.That(all, Does.Contain("\nKEPT before\n").And.Contain("\nAGAIN behind\n"), LinuxGuest.Tail(all));
        Assert.That(Regex.Matches(all, @"BEAT (\d+)\n").Select(static m => int.Parse(m.Groups[1].Value, System.Globalization.CultureInfo.InvariantCulture)), Is.EqualTo(Enumerable.Range(0, 120)));
    }

    private static string Mtty(string path) => $"vfio-pci,id=mtty,addr=2,sysfsdev={path},enable-migration=on";
}
