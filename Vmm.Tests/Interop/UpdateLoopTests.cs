using System.Text.Json.Nodes;
using Vmm.Tests.Support;
using Vmm.Tests.Unit.Cli;
using Vmm.Tests.Unit.Kvm;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Interop;

/// <summary>
/// Many updates in a row under load, with a vCPU and without: the guest rewrites and checks RAM, and a served edu function does DMA, each
/// transfer started by the interrupt of the one before. Prints the pauses that the VMM and the guest's clock measure.
/// </summary>
[TestFixture, NonParallelizable]
internal sealed class UpdateLoopTests : EndToEnd
{
    private const int StreamBytes = 24 << 10;

    [TestCase(false, 0, 64, 3, false)]
    [TestCase(false, 1, 64, 3, false)]
    [TestCase(false, 1, 64, 2, true)]
    [TestCase(true, 0, 64, 3, false)]
    [TestCase(true, 1, 64, 3, false)]
    [TestCase(true, 1, 64, 2, true)]
    public Task AFewUpdatesInARow(bool kvm, int devices, int ramMiB, int updates, bool exec) => Loop(kvm, devices, ramMiB, updates, exec, limitMs: null);

    [TestCase(false, 0, 4096, 100, 10.0)]
    [TestCase(false, 1, 4096, 100, 20.0)]
    [TestCase(true, 0, 4096, 100, 10.0)]
    [TestCase(true, 1, 4096, 100, 20.0)]
    [Category("slow"), Explicit("takes minutes, and its limits want a quiet machine"), CancelAfter(3_600_000)]
    public Task AHundredUpdatesInARow(bool kvm, int devices, int ramMiB, int updates, double limitMs) => Loop(kvm, devices, ramMiB, updates, exec: false, limitMs);

    /// <summary>There is no limit on the pause here, because with --exec the pause includes the start of the new program.</summary>
    [TestCase(false)]
    [TestCase(true)]
    [Category("slow"), Explicit("takes minutes"), CancelAfter(3_600_000)]
    public Task AHundredReplacementsInARow(bool kvm) => Loop(kvm, 1, 4096, 100, exec: true, limitMs: null);

    [TestCase(false)]
    [TestCase(true)]
    public async Task WhatIsSentDoesNotGrowWithRam(bool kvm)
    {
        // The stream has names and sizes of blocks. A size always takes 8 bytes, so both streams have the same length.
        Assert.That(await Loop(kvm, 0, 512, 1, exec: false, limitMs: null), Is.EqualTo(await Loop(kvm, 0, 64, 1, exec: false, limitMs: null)));
    }

    private async Task<long> Loop(bool kvm, int devices, int ramMiB, int updates, bool exec, double? limitMs)
    {
        if (kvm) KvmGuest.Require();
        string? socket = devices > 0 ? Vmm["edu.sock"] : null;
        UpdatedGuest guest = kvm ? UpdatedGuest.Kvm((ulong)ramMiB, socket) : UpdatedGuest.Synthetic((ulong)ramMiB, socket);
        if (socket is not null) await Vmm.Start("device", "serve", "--type", "edu", "--socket", socket).Line("serving edu");
        await Vmm.StartVmOf("a", guest.FirstBlock, [.. guest.Arguments]);
        await Patiently((m, cancel) => guest.WaitFilled(m, Vmm["words"], cancel));
        UpdatedGuest.Seen seen = default;
        await With(async m => seen = await guest.Look(m, Vmm["words"]));
        List<double> pauses = [], gaps = [];
        long bytes = 0;
        List<string> descriptors = [];
        for (int i = 0; i < updates; i++)
        {
            JsonNode result = JsonNode.Parse(await Vmm.Ok(["update", "--vm", "a", "--json", .. exec ? (string[])["--exec"] : []]))!;
            guest.Stops++;
            pauses.Add(result["pause-ms"]!.GetValue<double>());
            bytes = Math.Max(bytes, result["bytes"]!.GetValue<long>());
            await With(async monitor =>
            {
                seen = await guest.Look(monitor, Vmm["words"]);
                gaps.Add(seen.StopGapMs);
                await GoesOn(guest, monitor, seen.Interrupts, i);
            });
            int pid = result["pid"]!.GetValue<int>();
            if (i == 0) descriptors = LeakCheck.Descriptors(pid);
            LeakCheck.NoMoreThan(descriptors, pid);
        }
        await Patiently((m, cancel) => guest.Verify(m, Vmm["words"], cancel));
        await Vmm.Ok("quit", "--vm", "a");
        Assert.That(SpinWait.SpinUntil(() => !Vmm.Registered.Any(), VmmCommands.Deadline), "the VM's end removes its entry");
        string figures = $"{updates} updates, {(kvm ? "KVM guest" : "no CPU")}, {devices} devices, {ramMiB} MiB{(exec ? ", exec" : "")}: {Figures("pause", pauses)}; {Figures("by the guest's clock", gaps)}; "
            + $"{bytes} bytes a stream; {seen.Interrupts} interrupts";
        await TestContext.Out.WriteLineAsync(figures);
        Assert.That(bytes, Is.LessThan(StreamBytes), "the stream has no RAM pages");
        if (limitMs is { } most) Assert.That((Median(pauses), Median(gaps)), Is.EqualTo((Math.Min(Median(pauses), most), Math.Min(Median(gaps), most))), figures);
        return bytes;
    }

    /// <summary>Checks that interrupts still come: each starts the next transfer, so that one lost interrupt would end them all.</summary>
    private async Task GoesOn(UpdatedGuest guest, IMonitor monitor, long interrupts, int update)
    {
        if (guest.Device is null) return;
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        while ((await guest.Look(monitor, Vmm["words"])).Interrupts <= interrupts + 10)
            Assert.That(limit.IsCancellationRequested, Is.False, $"update {update + 1}: an interrupt was lost, the guest stands at step {interrupts}");
    }

    /// <summary>Runs a command with a long deadline, because the guest goes over all RAM for it.</summary>
    private async Task Patiently(Func<IMonitor, CancellationToken, Task> use)
    {
        using var patience = new CancellationTokenSource(TimeSpan.FromMinutes(15));
        await With(m => use(m, patience.Token));
    }

    private async Task With(Func<IMonitor, Task> use)
    {
        await using IMonitor monitor = await QmpMonitor.Connect(Vmm["vmm/a.qmp"], CancellationToken.None);
        await use(monitor);
    }

    private static string Figures(string what, List<double> ms) => $"{what} median {Median(ms):0.0} ms, 90% {ms.Order().ElementAt(ms.Count * 9 / 10):0.0} ms, longest {ms.Max():0.0} ms";

    private static double Median(List<double> values) => values.Order().ElementAt(values.Count / 2);
}
