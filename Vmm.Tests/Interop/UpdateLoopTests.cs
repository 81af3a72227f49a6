using System.Text.Json.Nodes;
using Vmm.Core.Interop;
using Vmm.Tests.Support;
using Vmm.Tests.Unit.Cli;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Demo;

namespace Vmm.Tests.Interop;

/// <summary>
/// Update after update under load: RAM that a workload rewrites, a served edu function that does DMA, and a guest whose every step waits for the
/// interrupt of the one before. Prints the pauses, as the VMM measures them and as the guest's own clock does.
/// </summary>
[TestFixture]
internal sealed class UpdateLoopTests : EndToEnd
{
    private const ulong AlignBytes = 2 << 20;

    [TestCase(0, 64, 3, false)]
    [TestCase(1, 64, 3, false)]
    [TestCase(1, 64, 2, true)]
    public Task AFewUpdatesInARow(int devices, int ramMiB, int updates, bool exec) => Loop(devices, ramMiB, updates, exec, limitMs: null);

    [TestCase(0, 4096, 100, 10.0)]
    [TestCase(1, 4096, 100, 20.0)]
    [Category("slow"), Explicit("takes minutes, and its limits want a quiet machine"), CancelAfter(3_600_000)]
    public Task AHundredUpdatesInARow(int devices, int ramMiB, int updates, double limitMs) => Loop(devices, ramMiB, updates, exec: false, limitMs);

    private async Task Loop(int devices, int ramMiB, int updates, bool exec, double? limitMs)
    {
        List<string> guest = ["--memory", $"{ramMiB}M,id=ram", "--memory", "1M,id=ticks", "--workload", "pattern,block=ram,rate=64M,prefill=on,state=on", "--device", "ticker"];
        if (devices > 0)
        {
            VmmCommands.Running server = Vmm.Start("device", "serve", "--type", "edu", "--socket", Vmm["edu.sock"]);
            await server.Line("serving edu");
            guest.AddRange(["--device", $"vfio-user-pci,id=dev0,socket={Vmm["edu.sock"]}", "--device", "edu-guest"]);
        }
        // First of all blocks: the function reaches 256 MiB.
        await Vmm.StartVmOf("a", "1M,id=edu", [.. guest]);
        await WaitFilled((long)ramMiB << 8);
        ulong ticks = AlignBytes + (((ulong)ramMiB << 20) + AlignBytes - 1) / AlignBytes * AlignBytes;
        var pauses = new List<double>();
        var gaps = new List<double>();
        long bytes = 0, steps = 0;
        int descriptors = 0;
        for (int i = 0; i < updates; i++)
        {
            JsonNode result = JsonNode.Parse(await Vmm.Ok(["update", "--vm", "a", "--json", .. exec ? (string[])["--exec"] : []]))!;
            int pid = result["pid"]!.GetValue<int>();
            pauses.Add(result["pause-ms"]!.GetValue<double>());
            bytes = Math.Max(bytes, result["bytes"]!.GetValue<long>());
            await using IMonitor monitor = await QmpMonitor.Connect(Vmm["vmm/a.qmp"], CancellationToken.None);
            long[] clock = await Words(monitor, ticks, 3);
            gaps.Add(clock[1] / 1e6);
            if (devices > 0)
            {
                long before = steps;
                long[] edu = await Words(monitor, 0, 2);
                Assert.That(edu[1], Is.Zero, "pages came back wrong");
                using var limit = new CancellationTokenSource(VmmCommands.Deadline);
                while ((steps = (await Words(monitor, 0, 1))[0]) <= edu[0] + 10) Assert.That(limit.IsCancellationRequested, Is.False, $"update {i + 1}: an interrupt was lost, the guest stands at step {steps}");
                Assert.That(steps, Is.GreaterThan(before));
            }
            int open = Directory.GetFiles($"/proc/{pid}/fd").Length;
            if (i == 0) descriptors = open;
            Assert.That(open, Is.LessThanOrEqualTo(descriptors + 2), $"update {i + 1}: descriptors leak");
        }
        await using (IMonitor monitor = await QmpMonitor.Connect(Vmm["vmm/a.qmp"], CancellationToken.None))
        {
            await monitor.Execute("stop", null, CancellationToken.None);
            JsonNode verified = (await monitor.Execute("__io.github.vmm_workload-verify", null, CancellationToken.None))!;
            Assert.That((verified["bad-pages"]!.GetValue<long>(), verified["violations"]!.GetValue<long>()), Is.EqualTo((0L, 0L)), verified.ToJsonString());
            Assert.That(verified["pages-checked"]!.GetValue<long>(), Is.EqualTo((long)ramMiB << 8));
        }
        await Vmm.Ok("quit", "--vm", "a");
        pauses.Sort();
        string figures = $"{updates} updates, {devices} devices, {ramMiB} MiB{(exec ? ", exec" : "")}: pause median {pauses[pauses.Count / 2]:0.0} ms, 90% {pauses[pauses.Count * 9 / 10]:0.0} ms, longest {pauses[^1]:0.0} ms; "
            + $"longest by the guest's clock {gaps.Max():0.0} ms; {bytes} bytes a stream; {steps} interrupts";
        await TestContext.Out.WriteLineAsync(figures);
        Assert.That(bytes, Is.LessThan(16 << 10), "RAM does not travel");
        if (limitMs is { } most) Assert.That(pauses[pauses.Count / 2], Is.LessThanOrEqualTo(most), figures);
    }

    private async Task WaitFilled(long pages)
    {
        await using IMonitor monitor = await QmpMonitor.Connect(Vmm["vmm/a.qmp"], CancellationToken.None);
        using var limit = new CancellationTokenSource(TimeSpan.FromMinutes(5));
        while ((await monitor.Execute("__io.github.vmm_workload-verify", null, limit.Token))!["writes"]!.GetValue<long>() < pages * 9 / 10) limit.Token.ThrowIfCancellationRequested();
    }

    private async Task<long[]> Words(IMonitor monitor, ulong address, int count)
    {
        string file = Vmm["words"];
        await monitor.Execute("pmemsave", new JsonObject { ["val"] = address, ["size"] = count * 8, ["filename"] = file }, CancellationToken.None);
        byte[] bytes = await File.ReadAllBytesAsync(file);
        return [.. Enumerable.Range(0, count).Select(i => BitConverter.ToInt64(bytes, i * 8))];
    }
}
