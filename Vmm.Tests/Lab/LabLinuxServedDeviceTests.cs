using System.Globalization;
using System.Text.Json.Nodes;
using System.Text.RegularExpressions;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Client;

namespace Vmm.Tests.Lab;

/// <summary>The shipped devices in a Linux guest of <c>vmm</c>. Each is served over vfio-user by its own process.</summary>
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
        PeerProcess vm = await vmm.StartVmOf("vm", Memory, [.. LinuxGuest.Boot(vmm), "--device", $"serial,output={vmm["console"]}", .. Device(vmm, "one", "edu"), .. Device(vmm, "one", "dma")]);
        await vm.Monitor.Execute("cont", null, CancellationToken.None);
        string console = await LinuxGuest.WaitFor(vmm["console"], "\nDONE", s_deadline);
        TestContext.Out.WriteLine(LinuxGuest.Tail(console));
        Assert.That(Checks(console).Distinct(), Is.EquivalentTo((string[])[.. s_eduChecks, messages ? "EDU msi ok" : "EDU intx ok", .. s_dmaChecks]), LinuxGuest.Tail(console));
    }

    /// <summary>The guest loads and unloads a driver in a loop, by turns with INTx and with MSI, so that the migration interrupts one of its checks.</summary>
    [TestCase("edu", TestName = "AServedDeviceMovesWithItsGuest(edu)")]
    [TestCase("dma", TestName = "AServedDeviceMovesWithItsGuest(dma-test)")]
    public async Task AServedDeviceMovesWithItsGuest(string device)
    {
        const int rounds = 30;
        bool isEdu = device == "edu";
        string module = isEdu ? "vmm_edu" : "vmm_dmatest";
        await using var vmm = new VmmCommands { StartDeadline = s_deadline };
        LinuxGuest.WriteInitrd(vmm["initrd"], $"""
            i=0; while [ $i -lt {rounds} ]; do insmod /m/{module}.ko {(isEdu ? "msi" : "msix")}=$((i % 2)); rmmod {module}; echo "ROUND $i"; i=$((i+1)); done
            dmesg | grep -E '(EDU|DMA) .* 0x'; warnings; echo DONE
            """, module);
        using VmmCommands.Running first = await Serve(vmm, "first"), second = await Serve(vmm, "second");
        PeerProcess to = await vmm.StartVmOf("to", Memory, ["--accel", "kvm", "--incoming", "tcp:127.0.0.1:0", "--device", $"serial,output={vmm["to"]}", .. Device(vmm, "second", device)]);
        PeerProcess from = await vmm.StartVmOf("from", Memory, [.. LinuxGuest.Boot(vmm), "--device", $"serial,output={vmm["from"]}", .. Device(vmm, "first", device)]);
        await from.Monitor.Execute("cont", null, CancellationToken.None);
        await LinuxGuest.WaitFor(vmm["from"], "ROUND 2\n", s_deadline);
        await from.Monitor.Execute("migrate", new JsonObject { ["uri"] = to.IncomingUri }, CancellationToken.None);
        try
        {
            await LinuxGuest.WaitFor(vmm["to"], "\nDONE", s_deadline);
        }
        catch (AssertionException e)
        {
            JsonNode? migration = await from.Monitor.Execute("query-migrate", null, CancellationToken.None);
            Assert.Fail($"{e.Message}\n{LinuxGuest.Tail(LinuxGuest.Read(vmm["from"]))}\n{migration?.ToJsonString()}\n{from.Errors}\n{to.Errors}");
        }
        string source = LinuxGuest.Read(vmm["from"]), all = source + LinuxGuest.Read(vmm["to"]);
        TestContext.Out.WriteLine(LinuxGuest.Tail(all));
        Assert.That(source, Does.Not.Contain($"ROUND {rounds - 2}\n"), "the guest migrated before its work ended");
        Assert.That(Regex.Matches(all, @"ROUND (\d+)\n").Select(static m => int.Parse(m.Groups[1].Value, CultureInfo.InvariantCulture)), Is.EqualTo(Enumerable.Range(0, rounds)));
        Dictionary<string, int> wanted = (isEdu ? s_eduChecks : s_dmaChecks).ToDictionary(static c => c, static _ => rounds);
        if (isEdu) wanted["EDU msi ok"] = wanted["EDU intx ok"] = rounds / 2 * 3;
        Assert.That(Checks(all).CountBy(static c => c).ToDictionary(), Is.EquivalentTo(wanted));
    }

    private static IEnumerable<string> Checks(string console) =>
        Regex.Matches(console, @"((EDU|DMA) \S+ (ok|FAILED)) 0x").Select(static m => m.Groups[1].Value);

    private static async Task<VmmCommands.Running> Serve(VmmCommands vmm, string name)
    {
        VmmCommands.Running serve = vmm.Start("device", "serve", "--type", "edu", "--socket", vmm[name + "-edu"], "--type", "dma-test,seed=1", "--socket", vmm[name + "-dma"]);
        await serve.Line($"at {vmm[name + "-dma"]}", TimeSpan.FromSeconds(90));
        return serve;
    }

    private static string[] Device(VmmCommands vmm, string name, string device) => ["--device", $"vfio-user-pci,id={device},socket={vmm[$"{name}-{device}"]}"];
}
