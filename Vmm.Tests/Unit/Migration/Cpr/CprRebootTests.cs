using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Cpr;

/// <summary>Mode cpr-reboot keeps the device state in one file and RAM in another that survives; a blocker blocks only the modes that it names.</summary>
[TestFixture]
public class CprRebootTests
{
    private const ulong Size = 4 << 20;

    [Test]
    public async Task StateGoesToAFileAndRamStaysInItsOwn()
    {
        using var folder = new TempDirectory();
        byte[] expected;
        using (TestVm before = On(folder["ram"], incoming: false).FilledRandom(5))
        {
            expected = before.Ram.ReadOnlySlice(0, (int)Size).ToArray();
            Prepare(before, MigrationMode.CprReboot);
            Assert.That(await before.Engine.Migrate(MigrationAddress.Parse($"file:{folder["state"]}")), Is.EqualTo(MigrationStatus.Completed), () => $"{before.Engine.Query().Error}");
            Assert.That(before.Engine.Query().Ram!.TotalBytes, Is.Zero);
        }
        Assert.That(new FileInfo(folder["state"]).Length, Is.LessThan(8 << 10));
        using TestVm after = On(folder["ram"], incoming: true);
        Prepare(after, MigrationMode.CprReboot);
        Assert.That(await after.Engine.MigrateIncoming(MigrationAddress.Parse($"file:{folder["state"]}")), Is.EqualTo(MigrationStatus.Completed), () => $"{after.Engine.Query().Error}");
        Assert.That(after.Ram.ReadOnlySlice(0, (int)Size).SequenceEqual(expected));
    }

    [Test]
    public async Task RamThatIsInNoFileIsInTheStream()
    {
        using var folder = new TempDirectory();
        using TestVm before = TestVm.WithRam(Size).FilledRandom(6);
        Prepare(before, MigrationMode.CprReboot);
        Assert.That(await before.Engine.Migrate(MigrationAddress.Parse($"file:{folder["state"]}")), Is.EqualTo(MigrationStatus.Completed));
        using TestVm after = TestVm.WithRam(Size, incoming: true);
        Prepare(after, MigrationMode.CprReboot);
        Assert.That(await after.Engine.MigrateIncoming(MigrationAddress.Parse($"file:{folder["state"]}")), Is.EqualTo(MigrationStatus.Completed), () => $"{after.Engine.Query().Error}");
        RamAssert.AreEqual(before.Vm.Memory, after.Vm.Memory);
    }

    [Test]
    public void ABlockerBlocksItsModesAndSuccessIsReportedAsSuccess()
    {
        using TestVm vm = TestVm.WithRam(Size);
        using (IDisposable blocker = vm.Vm.Services.GetService(typeof(MigrationBlockers)) is MigrationBlockers b ? b.Add("not today", MigrationModes.CprTransfer) : throw new InvalidOperationException())
        {
            Assert.That(blocker, Is.Not.Null);
            Prepare(vm, MigrationMode.CprTransfer);
            Assert.That(() => vm.Engine.Migrate(MigrationAddress.Parse("unix:/nonexistent/m"), MigrationAddress.Parse("unix:/nonexistent/c")),
                Throws.TypeOf<MigrationBlockedException>().With.Message.Contains("not today"));
            Assert.That(vm.Engine.Query().BlockedReasons, Is.EqualTo(new[] { "not today" }));
            Prepare(vm, MigrationMode.Normal);
            Assert.That(vm.Engine.Query().BlockedReasons, Is.Empty);
        }
        Prepare(vm, MigrationMode.CprTransfer);
        Assert.That(vm.Engine.Query().BlockedReasons, Is.Empty);
    }

    [Test]
    public void RamThatOtherProcessesCannotSeeBlocksTheModesThatShareIt()
    {
        using var vm = new TestVm(new VmOptions { Memory = [new RamBlockOptions { Name = "m", SizeBytes = Size, IsShared = false }] });
        foreach (MigrationMode mode in Enum.GetValues<MigrationMode>())
        {
            vm.Engine.Parameters = new MigrationParameters { Mode = mode };
            Assert.That(vm.Engine.Query().BlockedReasons.Count, Is.EqualTo(mode is MigrationMode.CprTransfer or MigrationMode.CprExec ? 1 : 0), $"{mode}");
        }
    }

    [TestCase(MigrationMode.CprTransfer, "unix:/x", null, "missing 'cpr' migration channel")]
    [TestCase(MigrationMode.CprTransfer, "unix:/x", "tcp:a:1", "must be unix")]
    [TestCase(MigrationMode.CprTransfer, "file:/x", "unix:/y", "streamable")]
    [TestCase(MigrationMode.CprExec, "file:/x", null, "cpr-exec-command")]
    [TestCase(MigrationMode.CprReboot, "unix:/x", null, "file: or exec:")]
    [TestCase(MigrationMode.Normal, "unix:/x", "unix:/y", "needs mode cpr-transfer")]
    public void ChannelsThatDoNotGoWithTheModeAreRefusedBeforeAnythingHappens(MigrationMode mode, string main, string? cpr, string reason)
    {
        using TestVm vm = TestVm.WithRam(Size);
        vm.Engine.Parameters = new MigrationParameters { Mode = mode };
        Assert.That(() => vm.Engine.Migrate(MigrationAddress.Parse(main), cpr is null ? null : MigrationAddress.Parse(cpr)), Throws.TypeOf<ConfigurationException>().With.Message.Contains(reason));
        Assert.That(vm.Engine.Status, Is.EqualTo(MigrationStatus.None));
    }

    private static TestVm On(string file, bool incoming) =>
        new(new VmOptions { Memory = [new RamBlockOptions { Name = "m", SizeBytes = Size, FilePath = file }], IsIncoming = incoming });

    private static void Prepare(TestVm vm, MigrationMode mode)
    {
        vm.Engine.Parameters = new MigrationParameters { Mode = mode };
        vm.Engine.SetCapabilities([new(MigrationCapability.XIgnoreShared, mode == MigrationMode.CprReboot)]);
    }
}
