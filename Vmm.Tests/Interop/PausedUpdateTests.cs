using System.Text.Json.Nodes;
using Vmm.Tests.Support;
using Vmm.Tests.Unit.Cli;
using Vmm.Tests.Unit.Kvm;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Interop;

/// <summary>A paused VM and its devices stay paused over an update, and both run again after cont.</summary>
[TestFixture, NonParallelizable]
internal sealed class PausedUpdateTests : EndToEnd
{
    [TestCase(false, "edu")]
    [TestCase(false, "edu,legacyMigrationRegion=on")]
    [TestCase(true, "edu")]
    [TestCase(true, "edu,legacyMigrationRegion=on")]
    public async Task APausedVmStaysPausedAndGoesOn(bool kvm, string device)
    {
        if (kvm) KvmGuest.Require();
        await Vmm.Start("device", "serve", "--type", device, "--socket", Vmm["edu.sock"]).Line("serving edu");
        UpdatedGuest guest = kvm ? UpdatedGuest.Kvm(64, Vmm["edu.sock"]) : UpdatedGuest.Synthetic(64, Vmm["edu.sock"]);
        await Vmm.StartVmOf("a", guest.FirstBlock, [.. guest.Arguments]);
        await WaitForInterrupts(guest, 10);
        foreach (bool exec in (bool[])[false, true])
        {
            await Vmm.Ok("stop", "--vm", "a");
            long before = (await Look(guest)).Interrupts;
            await Vmm.Ok(["update", "--vm", "a", .. exec ? (string[])["--exec"] : []]);
            Assert.That(JsonNode.Parse(await Vmm.Ok("status", "--vm", "a", "--json"))!["status"]!.ToString(), Is.EqualTo("paused"));
            Assert.That((await Look(guest)).Interrupts, Is.EqualTo(before), "the paused guest takes no interrupt");
            await Vmm.Ok("cont", "--vm", "a");
            await WaitForInterrupts(guest, before + 10);
        }
        await Vmm.Ok("quit", "--vm", "a");
    }

    private async Task WaitForInterrupts(UpdatedGuest guest, long past)
    {
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        while ((await Look(guest)).Interrupts <= past) Assert.That(limit.IsCancellationRequested, Is.False, "the device raises no more interrupts");
    }

    private async Task<UpdatedGuest.Seen> Look(UpdatedGuest guest)
    {
        await using IMonitor monitor = await QmpMonitor.Connect(Vmm["vmm/a.qmp"], CancellationToken.None);
        return await guest.Look(monitor, Vmm["words"]);
    }
}
