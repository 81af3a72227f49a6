using System.Diagnostics;
using System.Text.Json.Nodes;
using Vmm.Migration.Qmp;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tests.Unit.Cli;
using Vmm.Tools.Cli.Client;

namespace Vmm.Tests.Interop;

/// <summary><c>--only-migratable</c> refuses what QEMU's <c>-only-migratable</c> refuses, with its words.</summary>
[TestFixture, Category(QemuVersions.Category)]
internal sealed class OnlyMigratableTests : EndToEnd
{
    private const string Version = "11.1", Refusal = "disallowing migration blocker (--only-migratable) for: ";

    [Test]
    public async Task A_device_that_would_block_is_refused_as_QEMU_refuses_one()
    {
        Directory.CreateDirectory(Vmm["empty"]);
        // A writable vvfat is one of the few things that block QEMU's migration on any host.
        Assert.That(await QemuErrors("-blockdev", $"driver=vvfat,node-name=n,dir={Vmm["empty"]},rw=on"), Does.Contain(Refusal));
        using VmmCommands.Running serve = Vmm.Start("device", "serve", "--type", "dma-test", "--socket", Vmm["d.sock"]);
        await serve.Line("serving dma-test");
        CliResult result = await Vmm.Run("run", "--name", "a", "--memory", "16M", "--only-migratable", "--device", $"vfio-user-pci,id=dev0,socket={Vmm["d.sock"]},enable-migration=off");
        Assert.That((result.Code != 0, result.Error), Is.EqualTo((true, result.Error)));
        Assert.That(result.Error, Does.Contain($"{Refusal}device 'dev0'").And.Contain("enable-migration=off"));
    }

    [Test]
    public async Task The_human_monitor_says_so_as_QEMU_does([Values] bool on)
    {
        PeerProcess ours = await Vmm.StartVm("a", on ? ["--only-migratable"] : []);
        using var theirs = new QemuProcess(Version, 16 << 20, "m", on ? ["-S", "-only-migratable"] : ["-S"]);
        var line = new JsonObject { ["command-line"] = "info migrate -a" };
        string we = (await ours.Monitor.Execute("human-monitor-command", line.DeepClone().AsObject(), CancellationToken.None))!.ToString();
        string they = theirs.Run("human-monitor-command", line)!.ToString();
        Assert.That(Line(we), Is.EqualTo(Line(they)).And.Contain(on ? ": on" : ": off"));
    }

    private static string? Line(string text) => text.Split('\n').FirstOrDefault(static l => l.Contains("only-migratable", StringComparison.Ordinal))?.Trim();

    private static async Task<string> QemuErrors(params string[] arguments)
    {
        string[] all = ["-M", "none", "-only-migratable", "-nodefaults", "-display", "none", "-accel", "tcg", .. arguments];
        using Process qemu = Process.Start(new ProcessStartInfo(QemuVersions.Binary(Version), all) { RedirectStandardError = true, RedirectStandardInput = true })!;
        using var limit = new CancellationTokenSource(QemuProcess.Deadline);
        try
        {
            string errors = await qemu.StandardError.ReadToEndAsync(limit.Token);
            await qemu.WaitForExitAsync(limit.Token);
            return errors;
        }
        finally
        {
            if (!qemu.HasExited) qemu.Kill();
        }
    }
}
