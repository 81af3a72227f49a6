using System.Net.Sockets;
using System.Text.Json;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Registry;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

[System.Runtime.Versioning.SupportedOSPlatform("linux")]
internal sealed class VmDirectoryTests
{
    private TempDirectory _temp = null!;

    [SetUp]
    public void SetUp() => _temp = new TempDirectory();

    [TearDown]
    public void TearDown() => _temp.Dispose();

    private VmDirectory Open() => VmDirectory.Open(v => v == "XDG_RUNTIME_DIR" ? _temp.Path : null);

    [Test]
    public void It_lies_in_XDG_RUNTIME_DIR_or_in_a_directory_of_the_user_in_the_temp_directory() => Assert.Multiple(() =>
    {
        Assert.That(VmDirectory.DefaultPath(static v => v == "XDG_RUNTIME_DIR" ? "/run/user/7" : null), Is.EqualTo("/run/user/7/vmm"));
        Assert.That(VmDirectory.DefaultPath(static v => v == "XDG_RUNTIME_DIR" ? "relative" : null), Is.EqualTo($"/tmp/vmm-{PrivateDirectory.CurrentUserId}"));
        Assert.That(VmDirectory.DefaultPath(static v => v == "TMPDIR" ? "/scratch" : null), Is.EqualTo($"/scratch/vmm-{PrivateDirectory.CurrentUserId}"));
    });

    [Test]
    public void It_is_made_for_the_owner_alone()
    {
        Open();
        Assert.That(File.GetUnixFileMode(_temp["vmm"]), Is.EqualTo(UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute));
    }

    /// <summary>What a killed process of an update, or of its rehearsal, leaves; a VM that is named like such a file keeps its own.</summary>
    [Test]
    public void Files_of_processes_that_are_gone_are_removed()
    {
        VmDirectory directory = Open();
        const int nobody = int.MaxValue;
        string[] suffixes = [".next", ".main", ".cpr", ".report", ".state", ".try.main", ".try.cpr", ".try.dev"];
        foreach (int pid in (int[])[nobody, Environment.ProcessId])
            foreach (string suffix in suffixes) File.WriteAllText(_temp[$"vmm/{pid}{suffix}"], "");
        string[] others = ["a.main", $"{nobody}.other", $"{nobody}", "vm.try.cpr"];
        foreach (string name in others) File.WriteAllText(_temp[$"vmm/{name}"], "");
        directory.RemoveLeftovers();
        Assert.That(Directory.EnumerateFiles(_temp["vmm"]).Select(Path.GetFileName), Is.EquivalentTo(suffixes.Select(static s => $"{Environment.ProcessId}{s}").Concat(others)));
    }

    [Test]
    public void A_directory_that_others_may_enter_is_refused()
    {
        Directory.CreateDirectory(_temp["vmm"], (UnixFileMode)0b111_101_101);
        Assert.That(Open, Throws.TypeOf<ConfigurationException>().With.Message.Contains("755").And.Property("Hint").Contains("chmod 700"));
    }

    [Test]
    public void A_symbolic_link_is_refused()
    {
        Directory.CreateDirectory(_temp["real"], (UnixFileMode)0b111_000_000);
        Directory.CreateSymbolicLink(_temp["vmm"], _temp["real"]);
        Assert.That(Open, Throws.TypeOf<ConfigurationException>().With.Message.Contains("symbolic link"));
    }

    [Test]
    public void A_dangling_link_and_a_file_are_refused()
    {
        File.CreateSymbolicLink(_temp["vmm"], _temp["nothing"]);
        Assert.That(Open, Throws.TypeOf<ConfigurationException>());
        File.Delete(_temp["vmm"]);
        File.WriteAllText(_temp["vmm"], "");
        Assert.That(Open, Throws.TypeOf<ConfigurationException>().With.Message.Contains("not a directory"));
    }

    [Test]
    public void A_directory_of_another_user_is_refused()
    {
        // At least one of these exists and belongs to another user, whoever runs the tests.
        string? foreign = new[] { "/root", "/var/cache/apt/archives/partial", "/var/lib/private" }.FirstOrDefault(Refused);
        if (foreign is null) Assert.Ignore("no directory of another user is visible here");
        Assert.That(() => PrivateDirectory.Check(foreign!), Throws.TypeOf<ConfigurationException>().With.Message.Contains("belongs to user"));

        static bool Refused(string path)
        {
            try
            {
                PrivateDirectory.Check(path);
                return false;
            }
            catch (ConfigurationException e)
            {
                return e.Message.Contains("belongs to user", StringComparison.Ordinal);
            }
        }
    }

    [Test]
    public void A_missing_runtime_directory_is_an_error_that_names_it() =>
        Assert.That(() => VmDirectory.Open(v => v == "XDG_RUNTIME_DIR" ? _temp["gone"] : null), Throws.TypeOf<ConfigurationException>().With.Message.Contains("gone"));

    [Test]
    public void A_registered_VM_is_found_by_name_and_pid_and_when_it_is_the_only_one()
    {
        using VmRegistration one = Open().Register("alpha", null, 1 << 20);
        Assert.Multiple(() =>
        {
            Assert.That(one.Entry.QmpPath, Is.EqualTo(_temp["vmm/alpha.qmp"]));
            Assert.That(Open().Resolve("alpha"), Is.EqualTo(one.Entry));
            Assert.That(Open().Resolve($"{Environment.ProcessId}"), Is.EqualTo(one.Entry));
            Assert.That(Open().Resolve(null), Is.EqualTo(one.Entry));
        });
    }

    [Test]
    public void A_VM_without_a_name_is_known_by_its_pid()
    {
        using VmRegistration one = Open().Register(null, null, 0);
        Assert.That(one.Entry.QmpPath, Is.EqualTo(_temp[$"vmm/{Environment.ProcessId}.qmp"]));
    }

    [Test]
    public void Several_VMs_need_a_choice_and_none_is_unreachable()
    {
        Assert.That(() => Open().Resolve(null), Fails(ExitCode.Unreachable, "no VM runs"));
        using VmRegistration a = Open().Register("a", null, 0);
        using VmRegistration b = Open().Register("b", _temp["else.sock"], 0);
        Assert.That(() => Open().Resolve(null), Fails(ExitCode.Usage, "a, b"));
        Assert.That(() => Open().Resolve("c"), Fails(ExitCode.Unreachable, "'c'"));
    }

    [Test]
    public void A_name_in_use_is_refused_and_free_again_afterwards()
    {
        using (Open().Register("a", null, 0)) Assert.That(() => Open().Register("a", null, 0), Fails(ExitCode.Refused, "'a'"));
        Open().Register("a", null, 0).Dispose();
        Assert.That(Open().List(), Is.Empty);
    }

    [Test]
    public void Entries_and_sockets_of_dead_processes_are_removed_but_not_sockets_elsewhere()
    {
        VmDirectory directory = Open();
        WriteEntry("dead", 0x3fffffff, 1, _temp["vmm/dead.qmp"]);
        WriteEntry("reused", Environment.ProcessId, 1, _temp["vmm/reused.qmp"]);
        WriteEntry("far", 0x3fffffff, 1, _temp["far.sock"]);
        File.WriteAllText(_temp["vmm/broken.json"], "{");
        foreach (string socket in new[] { "vmm/dead.qmp", "vmm/reused.qmp", "far.sock" }) File.WriteAllText(_temp[socket], "");
        Assert.Multiple(() =>
        {
            Assert.That(directory.List(), Is.Empty);
            Assert.That(Directory.EnumerateFiles(_temp["vmm"]).Select(Path.GetFileName), Is.EqualTo(new[] { ".lock" }));
            Assert.That(File.Exists(_temp["far.sock"]));
        });
    }

    [Test]
    public void A_VM_whose_socket_answers_is_alive_though_its_pid_is_unknown_here()
    {
        VmDirectory directory = Open();
        using var listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        listener.Bind(new UnixDomainSocketEndPoint(_temp["vmm/other.qmp"]));
        listener.Listen();
        WriteEntry("other", 0x3fffffff, 1, _temp["vmm/other.qmp"]);
        Assert.That(directory.List().Select(static e => e.Key), Is.EqualTo(new[] { "other" }));
    }

    private void WriteEntry(string name, int pid, long ticks, string qmp) =>
        File.WriteAllText(_temp[$"vmm/{name}.json"], JsonSerializer.Serialize(new VmEntry { Name = name, Pid = pid, StartTicks = ticks, QmpPath = qmp }));

    private static NUnit.Framework.Constraints.IResolveConstraint Fails(ExitCode code, string text) =>
        Throws.TypeOf<CliException>().With.Message.Contains(text).And.Property(nameof(CliException.Code)).EqualTo(code);
}
