using System.Text.Json.Nodes;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tests.Unit.Kvm;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Guests;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

/// <summary>A real guest in real processes.</summary>
[NonParallelizable]
internal sealed class KvmEndToEndTests : EndToEnd
{
    [Test]
    public async Task A_guest_drives_every_shipped_device_over_vfio_user_and_one_of_its_own()
    {
        KvmGuest.Require();
        string[] types = ["edu", "gpio-pci-idio-16", "sample", "dma-test,seed=1"];
        using VmmCommands.Running serve = Vmm.Start(["device", "serve", .. types.SelectMany((t, i) => (string[])["--type", t, "--socket", Vmm[$"device-{i}"]])]);
        await serve.Line($"at {Vmm[$"device-{types.Length - 1}"]}");
        PeerProcess vm = await Vmm.StartVmOf("vm", "4M,share=on", ["--accel", "kvm", "--kernel", "builtin:devcheck", "--device", $"serial,output={Vmm["serial"]}", "--device", "edu",
            .. types.SelectMany((_, i) => (string[])["--device", $"vfio-user-pci,id=dev{i},socket={Vmm[$"device-{i}"]}"])]);
        DateTime end = DateTime.UtcNow + KvmGuest.Deadline;
        while ((await vm.Monitor.Query("query-status", CancellationToken.None))["status"]!.ToString() != "shutdown" && DateTime.UtcNow < end)
        {
        }
        string file = Vmm["state"];
        await vm.Monitor.Execute("pmemsave", new JsonObject { ["val"] = (long)DevCheckGuest.StateAddress, ["size"] = DevCheckGuest.StateBytes, ["filename"] = file }, CancellationToken.None);
        DevCheckGuest.Found found = DevCheckGuest.Found.Of(await File.ReadAllBytesAsync(file));
        Assert.That((found.Rounds, found.Devices, found.Broken, found.FirstBroken), Is.EqualTo((1ul, 5ul, 0ul, 0ul)), $"{found}");
        Assert.That(found.Held, Is.EqualTo(2 * 13 + 3 + 3 + 6), $"{found}");
        Assert.That(File.ReadAllText(Vmm["serial"]).Split('\n', StringSplitOptions.RemoveEmptyEntries).Order(),
            Is.EqualTo(new[] { "dma-test checked", "edu checked", "edu checked", "gpio-pci-idio-16 checked", "sample checked" }));
    }

    [Test]
    public async Task A_malformed_kernel_and_impossible_memory_are_refused_before_the_guest_runs()
    {
        KvmGuest.Require();
        string elf = Vmm["elf"];
        await File.WriteAllBytesAsync(elf, [0x7f, (byte)'E', (byte)'L', (byte)'F', 1, 2, 3]);
        CliResult cut = await Vmm.Run("run", "--kernel", elf), small = await Vmm.Run("run", "--kernel", "builtin:smp", "--memory", "1M"),
            large = await Vmm.Run("run", "--kernel", "builtin:smp", "--memory", "4G"), none = await Vmm.Run("run", "--kernel", "builtin:smp", "--accel", "none"),
            program = await Vmm.Run("run", "--accel", "kvm"), cpus = await Vmm.Run("run", "--kernel", "builtin:smp", "--cpus", "0");
        Assert.Multiple(() =>
        {
            Assert.That((cut.Code, cut.Error), Is.EqualTo((ExitCode.Usage, cut.Error)));
            Assert.That(cut.Error, Does.Contain("the ELF header is cut short"));
            Assert.That(small.Error, Does.Contain("at least 2 MiB"));
            Assert.That(large.Error, Does.Contain("at most 3 GiB"));
            Assert.That(none.Error, Does.Contain("without an accelerator"));
            Assert.That(program.Error, Does.Contain("--kernel"));
            Assert.That(cpus.Error, Does.Contain("1 to 64"));
        });
    }
}
