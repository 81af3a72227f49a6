using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Shell;
using Vmm.Tools.Devices;

namespace Vmm.Tests.Unit.Cli;

/// <summary>Runs <c>vmm device</c> as a process of its own.</summary>
[TestFixture]
internal sealed class DeviceServeTests : EndToEnd
{
    private static RawVfioUserClient Dial(string path)
    {
        OwnedFd socket = Posix.Socket(Posix.AF_UNIX);
        Assert.That(Posix.Connect(socket, Posix.UnixAddress(path), null, 5000), Is.EqualTo(Errno.None));
        var client = new RawVfioUserClient(socket);
        client.Negotiate();
        return client;
    }

    [Test]
    public async Task TheListNamesEveryType()
    {
        Assert.That(await Vmm.Ok("device", "list"), Does.StartWith("dma-test  "));
        Assert.That(await Vmm.Ok("device", "list", "--json"), Does.Contain("\"type\": \"dma-test\""));
    }

    [Test]
    public async Task TwoDevicesAreServedUntilSigtermAndTheirSocketsAreGoneThen()
    {
        string one = Vmm["one"], two = Vmm["two"];
        using VmmCommands.Running serve = Vmm.Start("device", "serve", "--type", "dma-test,seed=1", "--socket", one, "--type", "dma-test,seed=2,state-size=1M", "--socket", two);
        await serve.Line($"serving dma-test at {one}, pid {serve.Pid}");
        await serve.Line($"serving dma-test at {two}");
        using (RawVfioUserClient a = Dial(one), b = Dial(two))
        {
            Assert.That((a.Read64(0, DmaTestRegisters.StateSize), b.Read64(0, DmaTestRegisters.StateSize)), Is.EqualTo((0UL, 1UL << 20)));
            serve.Signal(SigTerm);
            CliResult result = await serve.Finish();
            Assert.That(result.Code, Is.EqualTo(ExitCode.Ok), result.Error);
            Assert.That(result.Error, Does.Contain($"{one}: 1 sessions, 1 messages"));
        }
        Assert.That((File.Exists(one), File.Exists(two)), Is.EqualTo((false, false)));
    }

    [Test]
    public async Task OnceEndsWithItsClient()
    {
        using VmmCommands.Running serve = Vmm.Start("device", "serve", "--once", "--type", "dma-test", "--socket", Vmm["one"]);
        await serve.Line("serving");
        Dial(Vmm["one"]).Dispose();
        Assert.That((await serve.Finish()).Code, Is.EqualTo(ExitCode.Ok));
    }

    [Test]
    public async Task AServerThatWasKilledLeavesASocketThatTheNextOneReplaces()
    {
        using (VmmCommands.Running first = Vmm.Start("device", "serve", "--type", "dma-test", "--socket", Vmm["one"]))
        {
            await first.Line("serving");
            first.Signal(SigKill);
            await first.Finish();
        }
        Assert.That(File.Exists(Vmm["one"]));
        using VmmCommands.Running second = Vmm.Start("device", "serve", "--type", "dma-test", "--socket", Vmm["one"]);
        await second.Line("serving");
        Dial(Vmm["one"]).Dispose();
    }

    [Test]
    public async Task WrongUsageIsRefusedBeforeAnythingIsServed()
    {
        foreach ((string type, string says) in new (string, string)[]
        {
            ("nothing", "no device type 'nothing'"), ("dma-test,bogus=1", "unknown option 'bogus'"), ("dma-test,state-size=x", "expects a size"), ("dma-test,legacyMigrationRegion=2", "on or off"),
        })
        {
            CliResult result = await Vmm.Run("device", "serve", "--type", type, "--socket", Vmm["one"]);
            Assert.That((result.Code, File.Exists(Vmm["one"])), Is.EqualTo((ExitCode.Usage, false)), type);
            Assert.That(result.Error, Does.Contain(says));
        }
        Assert.That((await Vmm.Run("device", "serve", "--type", "dma-test", "--socket", Vmm["one"], "--socket", Vmm["two"])).Code, Is.EqualTo(ExitCode.Usage));
    }
}
