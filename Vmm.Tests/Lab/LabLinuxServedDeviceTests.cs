using System.Globalization;
using System.Text.Json.Nodes;
using System.Text.RegularExpressions;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Demo;

namespace Vmm.Tests.Lab;

/// <summary>The shipped devices, each served over vfio-user by a process of its own, in a Linux guest of <c>vmm</c>.</summary>
[TestFixture]
[Category(Slow)]
public sealed class LabLinuxServedDeviceTests : LabFixture
{
    private const string Memory = "160M,share=on";
    private static readonly string[] s_eduChecks = ["EDU id ok", "EDU inverts ok", "EDU dma-from-memory ok", "EDU dma-to-memory ok", "EDU dma-content ok"];
    private static readonly string[] s_dmaChecks = ["DMA id ok", "DMA memory ok", "DMA interrupts ok", "DMA masked ok", "DMA unmasked ok", "DMA dma ok"];
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(180);

    [TestCase(false, TestName = "ServedDevicesWorkInTheGuest(pins)")]
    [TestCase(true, TestName = "ServedDevicesWorkInTheGuest(messages)")]
    public async Task ServedDevicesWorkInTheGuest(bool messages)
    {
        await using var vmm = new VmmCommands { StartDeadline = s_deadline };
        int on = messages ? 1 : 0;
        LinuxGuest.WriteInitrd(vmm["initrd"], $"""
            insmod /m/vmm_edu.ko msi={on}; insmod /m/vmm_dmatest.ko msix={on}
            grep -E 'edu|dmatest' /proc/interrupts; dmesg | grep -E '(EDU|DMA) .* 0x'; echo DONE
            """, "vmm_edu", "vmm_dmatest");
        using VmmCommands.Running serve = await Serve(vmm, "one");
        PeerProcess vm = await vmm.StartVmOf("vm", Memory, [.. Boot(vmm), "--device", $"serial,output={vmm["console"]}", .. Devices(vmm, "one")]);
        await vm.Monitor.Execute("cont", null, CancellationToken.None);
        string console = await LinuxGuest.WaitFor(vmm["console"], "\nDONE", s_deadline);
        TestContext.Out.WriteLine(LinuxGuest.Tail(console));
        Assert.That(Checks(console).Distinct(), Is.EquivalentTo((string[])[.. s_eduChecks, messages ? "EDU msi ok" : "EDU intx ok", .. s_dmaChecks]), LinuxGuest.Tail(console));
    }

    /// <summary>Drivers are loaded and unloaded all the time, by turns with pins and with messages: the move falls into the middle of some check.</summary>
    [Test]
    public async Task ServedDevicesMoveWithTheirGuest()
    {
        const int rounds = 16;
        await using var vmm = new VmmCommands { StartDeadline = s_deadline };
        LinuxGuest.WriteInitrd(vmm["initrd"], $"""
            i=0; while [ $i -lt {rounds} ]; do
              insmod /m/vmm_edu.ko msi=$((i % 2)); insmod /m/vmm_dmatest.ko msix=$((i % 2)); rmmod vmm_edu; rmmod vmm_dmatest; echo "ROUND $i"; i=$((i+1))
            done
            dmesg | grep -E '(EDU|DMA) .* 0x'; warnings; echo DONE
            """, "vmm_edu", "vmm_dmatest");
        using VmmCommands.Running first = await Serve(vmm, "first"), second = await Serve(vmm, "second");
        PeerProcess to = await vmm.StartVmOf("to", Memory, ["--accel", "kvm", "--incoming", "tcp:127.0.0.1:0", "--device", $"serial,output={vmm["to"]}", .. Devices(vmm, "second")]);
        PeerProcess from = await vmm.StartVmOf("from", Memory, [.. Boot(vmm), "--device", $"serial,output={vmm["from"]}", .. Devices(vmm, "first")]);
        await from.Monitor.Execute("cont", null, CancellationToken.None);
        await LinuxGuest.WaitFor(vmm["from"], "ROUND 3\n", s_deadline);
        await from.Monitor.Execute("migrate", new JsonObject { ["uri"] = to.IncomingUri }, CancellationToken.None);
        await LinuxGuest.WaitFor(vmm["to"], "\nDONE", s_deadline);
        string source = LinuxGuest.Read(vmm["from"]), all = source + LinuxGuest.Read(vmm["to"]);
        TestContext.Out.WriteLine(LinuxGuest.Tail(all));
        Assert.That(source, Does.Not.Contain($"ROUND {rounds - 2}\n"), "it moved while it worked");
        Assert.That(Regex.Matches(all, @"ROUND (\d+)\n").Select(static m => int.Parse(m.Groups[1].Value, CultureInfo.InvariantCulture)), Is.EqualTo(Enumerable.Range(0, rounds)));
        var found = Checks(all).CountBy(static c => c).ToDictionary();
        foreach (string check in s_eduChecks.Concat(s_dmaChecks)) Assert.That(found.GetValueOrDefault(check), Is.EqualTo(rounds), check);
        Assert.That((found.GetValueOrDefault("EDU msi ok"), found.GetValueOrDefault("EDU intx ok")), Is.EqualTo((rounds / 2 * 3, rounds / 2 * 3)));
        Assert.That(found.Keys.Where(static k => k.EndsWith("FAILED", StringComparison.Ordinal)), Is.Empty);
    }

    private static IEnumerable<string> Checks(string console) =>
        Regex.Matches(console, @"((EDU|DMA) \S+ (ok|FAILED)) 0x").Select(static m => m.Groups[1].Value);

    private static async Task<VmmCommands.Running> Serve(VmmCommands vmm, string name)
    {
        VmmCommands.Running serve = vmm.Start("device", "serve", "--type", "edu", "--socket", vmm[name + "-edu"], "--type", "dma-test,seed=1", "--socket", vmm[name + "-dma"]);
        await serve.Line($"at {vmm[name + "-dma"]}", TimeSpan.FromSeconds(90));
        return serve;
    }

    private static string[] Devices(VmmCommands vmm, string name) =>
        ["--device", $"vfio-user-pci,id=edu,addr=4,socket={vmm[name + "-edu"]}", "--device", $"vfio-user-pci,id=dma,addr=5,socket={vmm[name + "-dma"]}"];

    private static string[] Boot(VmmCommands vmm) =>
        ["--paused", "--accel", "kvm", "--kernel", LinuxGuest.Kernel, "--initrd", vmm["initrd"], "--append", LinuxGuest.CommandLine + " loglevel=1"];
}
