using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Tools.Cli.Hosting;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

internal sealed class RunOptionsTests
{
    [Test]
    public void One_block_of_128_MiB_called_ram_is_the_default() =>
        Assert.That(MemoryOption.Parse([]), Is.EqualTo(new[] { new RamBlockOptions { Name = "ram", SizeBytes = 128 << 20 } }));

    [Test]
    public void Blocks_are_named_ram_then_ram1_then_ram2_unless_id_says_otherwise() =>
        Assert.That(MemoryOption.Parse(["1M", "2M", "3M,id=low", "4M"]).Select(static b => (b.Name, b.SizeBytes >> 20)),
            Is.EqualTo(new (string, ulong)[] { ("ram", 1), ("ram1", 2), ("low", 3), ("ram3", 4) }));

    [Test]
    public void Every_key_of_a_block_arrives()
    {
        RamBlockOptions block = MemoryOption.Parse(["size=1G,id=x,file=/tmp/a,,b,share=off,prealloc=on,hugepages=off"])[0];
        Assert.That(block, Is.EqualTo(new RamBlockOptions
        {
            Name = "x", SizeBytes = 1 << 30, FilePath = "/tmp/a,b", IsShared = false, Prealloc = true, HugePages = false,
        }));
    }

    [TestCase("", "--memory")]
    [TestCase("0", "multiple of 4096")]
    [TestCase("4097", "multiple of 4096")]
    [TestCase("1Q", "'1Q'")]
    [TestCase("-1M", "'-1M'")]
    [TestCase("99999999999999999999", "expects a size")]
    [TestCase("1M,foo=1", "'foo' is not known")]
    [TestCase("1M,share", "key=value")]
    [TestCase("1M,share=maybe", "'share' expects on or off")]
    [TestCase("1M,id=", "'id' must be")]
    [TestCase("1M,id=é", "'id' must be")]
    [TestCase("1M,file=", "'file' needs a path")]
    [TestCase("1M,id=a,id=b", "'id' is given twice")]
    public void A_bad_block_is_refused_and_named(string text, string expected) =>
        Assert.That(() => MemoryOption.Parse([text]), Throws.TypeOf<ConfigurationException>().With.Message.Contains(expected));

    [Test]
    public void Two_blocks_with_one_id_are_refused() =>
        Assert.That(() => MemoryOption.Parse(["1M", "1M,id=ram"]), Throws.TypeOf<ConfigurationException>().With.Message.Contains("'ram' is used twice"));

    [Test]
    public void A_workload_is_a_device_whose_rate_may_carry_its_unit()
    {
        RunOptions options = RunOptions.Parse(new() { Workload = ["pattern,rate=10M/s,seed=3"] });
        Assert.Multiple(() =>
        {
            Assert.That(options.Vm.Devices[0].TypeName, Is.EqualTo("pattern"));
            Assert.That(options.Vm.Devices[0].GetSizeBytes("rate", 0), Is.EqualTo(10u << 20));
            Assert.That(options.Vm.Devices[0].GetUInt64("seed", 0), Is.EqualTo(3u));
        });
    }

    [Test]
    public void Only_migratable_reaches_the_VM([Values] bool on) =>
        Assert.That(RunOptions.Parse(new() { OnlyMigratable = on }).Vm.OnlyMigratable, Is.EqualTo(on));

    [Test]
    public void Relative_paths_are_those_of_the_command() => Assert.Multiple(() =>
    {
        Assert.That(RunOptions.Parse(new() { Incoming = "unix:a.sock" }).Incoming!.Path, Is.EqualTo(Path.GetFullPath("a.sock")));
        Assert.That(RunOptions.Parse(new() { Qmp = "unix:q.sock,server=on,wait=off" }).QmpPath, Is.EqualTo(Path.GetFullPath("q.sock")));
        Assert.That(RunOptions.Parse(new() { Qmp = "q.sock" }).QmpPath, Is.EqualTo(Path.GetFullPath("q.sock")));
    });

    [Test]
    public void Deferred_incoming_waits_without_an_address()
    {
        RunOptions options = RunOptions.Parse(new() { Incoming = "defer", Paused = true });
        Assert.That((options.Vm.IsIncoming, options.Incoming, options.Vm.AutoStart), Is.EqualTo((true, (object?)null, false)));
    }

    private static IEnumerable<TestCaseData> Refused()
    {
        yield return new TestCaseData(new RunOptions.Texts { Machine = "q35" }, "--machine 'q35'");
        yield return new TestCaseData(new RunOptions.Texts { Accel = "xen" }, "--accel 'xen'");
        yield return new TestCaseData(new RunOptions.Texts { Accel = "kvm,dirty-ring-size=many" }, "'dirty-ring-size' must be a number");
        yield return new TestCaseData(new RunOptions.Texts { Accel = "kvm,speed=11" }, "'speed' is not known");
        yield return new TestCaseData(new RunOptions.Texts { Accel = "none,dirty-ring-size=1024" }, "'dirty-ring-size' is not known");
        yield return new TestCaseData(new RunOptions.Texts { Uuid = "1" }, "--uuid '1'");
        yield return new TestCaseData(new RunOptions.Texts { Incoming = "foo" }, "--incoming 'foo': unknown migration protocol");
        yield return new TestCaseData(new RunOptions.Texts { Incoming = "tcp:a:99999" }, "--incoming 'tcp:a:99999'");
        yield return new TestCaseData(new RunOptions.Texts { Workload = ["random"] }, "--workload 'random'");
        yield return new TestCaseData(new RunOptions.Texts { Device = [",a=b"] }, "device option");
        yield return new TestCaseData(new RunOptions.Texts { Qmp = "" }, "--qmp");
        yield return new TestCaseData(new RunOptions.Texts { SnapshotDir = "" }, "--snapshot-dir");
        foreach (string name in new[] { "", "a/b", "..", ".a", "12", "a b", new string('x', 65) })
            yield return new TestCaseData(new RunOptions.Texts { Name = name }, "--name");
    }

    [TestCaseSource(nameof(Refused))]
    public void A_wrong_option_is_usage_and_named(object texts, string expected) =>
        Assert.That(() => RunOptions.Parse((RunOptions.Texts)texts),
            Throws.TypeOf<CliException>().With.Message.Contains(expected).And.Property(nameof(CliException.Code)).EqualTo(ExitCode.Usage));
}
