using System.Diagnostics;
using System.Text.RegularExpressions;
using Vmm.Tests.Support;

namespace Vmm.Tests.House;

/// <summary>The messages of tools/lab/lab when something is missing, has changed or hangs, in faked environments.</summary>
[TestFixture]
public sealed class LabScriptTests
{
    private static readonly string s_lab = Path.Combine(HouseTests.Root, "tools/lab");

    private TempDirectory _folder = null!;

    [SetUp]
    public void MakeFolder()
    {
        _folder = new TempDirectory();
        Directory.CreateDirectory(_folder["bin"]);
    }

    [TearDown]
    public void RemoveFolder() => _folder.Dispose();

    [Test]
    public void EveryTestThatAClaimNamesExists()
    {
        string[] names = [.. File.ReadAllLines(Path.Combine(s_lab, "CLAIMS.md")).SelectMany(static l => Regex.Matches(l, @"`(Spec\w+)`").Select(static m => m.Groups[1].Value)).Distinct()];
        HashSet<string> methods = [.. typeof(LabScriptTests).Assembly.GetTypes().SelectMany(static t => t.GetMethods()).Select(static m => m.Name)];
        Assert.That(names, Has.Length.GreaterThan(40));
        Assert.That(names.Where(n => !methods.Contains(n)), Is.Empty);
    }

    [Test]
    public void AMissingPackageIsNamedToWhoCannotInstallIt()
    {
        // The script finds all other programs that it calls, but neither compiler nor emulator.
        foreach (string tool in (string[])["bash", "dirname", "sed", "grep", "head", "cat", "sha256sum", "cut", "mkdir", "flock", "make", "xz", "strip", "python3"]) Link(tool);
        Fake("id", "echo 1000");
        (int status, string errors) = Lab(_folder["bin"], "build");
        Assert.That((status, errors), Is.EqualTo((1, "tools/lab/lab: missing packages: gcc-12 qemu-system-x86 (apt-get install them, or run this once as root)\n")));
    }

    [Test]
    public void AMirrorThatCannotBeReadIsNamed()
    {
        FakeTools(update: "exit 1", depends: "", download: "");
        (int status, string errors) = Lab(PathWithFakes, "build");
        Assert.That((status, errors), Is.EqualTo((1, "tools/lab/lab: cannot read the package lists of bookworm-security\n")));
    }

    [Test]
    public void ASuiteWithoutTheKernelIsNamed()
    {
        FakeTools(update: "", depends: "", download: "");
        (int status, string errors) = Lab(PathWithFakes, "build");
        Assert.That(status, Is.EqualTo(1));
        Assert.That(errors, Does.Contain("bookworm-security has no linux-image-6.12-cloud-amd64 any more").And.Contain("kernel.bash"));
    }

    [Test]
    public void APackageThatCannotBeDownloadedIsNamed()
    {
        FakeTools(update: "", depends: "echo '  Depends: linux-image-6.12.9+deb12-cloud-amd64'", download: "echo 'E: no such package' >&2; exit 100");
        (int status, string errors) = Lab(PathWithFakes, "build");
        Assert.That(status, Is.EqualTo(1));
        Assert.That(errors, Does.Contain("E: no such package").And.Contain("cannot download kernel 6.12.9+deb12-cloud-amd64 from bookworm-security"));
    }

    [Test]
    public void AGuestThatHangsIsStoppedAndTheEndOfItsConsoleShown()
    {
        (int status, string output, string errors) = Boot("echo 'LAB-UP 5.0' > $console; echo 'waiting for a disk' >> $console; exec sleep 600", silenceSeconds: 3);
        Assert.That(status, Is.EqualTo(1));
        Assert.That(errors, Does.Contain("the guest said nothing for 3 s and was stopped; the console's end:").And.Contain("waiting for a disk"));
        Assert.That(output, Does.EndWith("0 passed, 1 failed, 0 skipped\n"));
    }

    [Test]
    public void AGuestThatEndsTooEarlyShowsTheEndOfItsConsoleAndWhatTheEmulatorSaid()
    {
        (int status, string output, string errors) = Boot("echo 'Kernel panic - not syncing' > $console; echo 'could not map memory' >&2; exit 1");
        Assert.That(status, Is.EqualTo(1));
        Assert.That(errors, Does.Contain("the guest ended before its tests did").And.Contain("Kernel panic").And.Contain("could not map memory"));
        Assert.That(output, Does.EndWith("0 passed, 1 failed, 0 skipped\n"));
    }

    [Test]
    public void ATestThatTheGuestDidNotSurviveIsNamed()
    {
        (int status, string output, _) = Boot("""echo '{"event":"start","name":"Lab.A.Spec2_B"}' > $records; exit 0""", filter: "A");
        Assert.That(status, Is.EqualTo(1));
        Assert.That(output, Does.Contain("Lab.A.Spec2_B: the guest ended or hung in this test").And.EndsWith("0 passed, 1 failed, 0 skipped\n"));
    }

    private string PathWithFakes => $"{_folder["bin"]}:{Environment.GetEnvironmentVariable("PATH")}";

    private void FakeTools(string update, string depends, string download)
    {
        foreach (string tool in (string[])["gcc-12", "qemu-system-x86_64", "make", "xz", "strip"]) Fake(tool, "exit 1");
        Fake("apt-get", $"case \"$*\" in *update*) {update} ;; *download*) {download} ;; esac");
        Fake("apt-cache", $"case \"$*\" in *depends*) {depends} ;; *policy*) echo '  Candidate: 1' ;; esac");
    }

    private void Fake(string tool, string script)
    {
        string path = Path.Combine(_folder["bin"], tool);
        File.WriteAllText(path, $"#!/bin/bash\n{script}\n");
        File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
    }

    private void Link(string tool)
    {
        string found = Environment.GetEnvironmentVariable("PATH")!.Split(':').Select(f => Path.Combine(f, tool)).FirstOrDefault(File.Exists) ?? "";
        if (found.Length == 0) QemuVersions.Missing($"{tool} is missing");
        File.CreateSymbolicLink(Path.Combine(_folder["bin"], tool), found);
    }

    /// <summary>Runs the script with a private cache.</summary>
    private (int Status, string Errors) Lab(string path, string verb)
    {
        (int status, _, string errors) = Bash(path, $"exec '{s_lab}/lab' {verb}");
        return (status, errors);
    }

    /// <summary>Boots a script in place of the emulator. Its variables <c>console</c> and <c>records</c> name the files to write.</summary>
    private (int Status, string Output, string Errors) Boot(string emulator, string filter = "", int silenceSeconds = 180)
    {
        Fake("emulator", """
            files=($(printf '%s\n' "$@" | sed -n 's/^file://p')); console="${files[0]}" records="${files[1]}"

            """ + emulator);
        return Bash(PathWithFakes, $$"""
            set -euo pipefail; me=tools/lab/lab here='{{s_lab}}' lab='{{_folder.Path}}'
            . "$here/boot.bash"; work=$(mktemp -d); : > "$work/initrd"; lab_run '{{filter}}'
            """, ("VMM_QEMU_LAB", Path.Combine(_folder["bin"], "emulator")), ("VMM_LAB_SILENCE", $"{silenceSeconds}"));
    }

    private (int Status, string Output, string Errors) Bash(string path, string script, params (string Name, string Value)[] variables)
    {
        var info = new ProcessStartInfo("/bin/bash", ["-c", script]) { RedirectStandardOutput = true, RedirectStandardError = true };
        info.Environment["PATH"] = path;
        info.Environment["VMM_CACHE"] = _folder["cache"];
        info.Environment["TMPDIR"] = _folder.Path;
        foreach ((string name, string value) in variables) info.Environment[name] = value;
        using Process process = Process.Start(info)!;
        Task<string> errors = process.StandardError.ReadToEndAsync();
        string output = process.StandardOutput.ReadToEnd();
        if (!process.WaitForExit(60_000))
        {
            process.Kill(entireProcessTree: true);
            Assert.Fail("the script did not end within 60 s");
        }
        return (process.ExitCode, output, errors.Result);
    }
}
