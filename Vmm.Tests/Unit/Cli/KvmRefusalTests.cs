using System.Buffers.Binary;
using System.Security.Cryptography;
using System.Text;
using Vmm.Core.Interop;
using Vmm.Core.Kvm;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tests.Unit.Kvm;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Guests;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

/// <summary>
/// The VMM refuses a state that this host cannot run before the guest runs, and the error says what is wrong. The state stays intact for a host
/// that can run it.
/// </summary>
[NonParallelizable]
internal sealed class KvmRefusalTests : KvmEndToEnd
{
    private const uint UnknownMsr = 0x12345;

    /// <summary>Offsets of the first vCPU's items in a saved state, in the order of <c>KvmCpuState.Description</c>.</summary>
    private sealed record Places(int Cpuid, int FeatureByte, int XsaveLength, int Xsave, int XsaveBytes, int MsrIndex)
    {
        /// <summary>Finds the items by the CPUID and the registers that a vCPU on this host has.</summary>
        internal static Places In(byte[] stream)
        {
            using KvmGuest probe = KvmGuest.MemCheck();
            KvmCpuState state = probe.Kvm.CpuStates[0];
            state.Save();
            int cpuid = stream.AsSpan().IndexOf(state.Cpuid);
            CpuidEntries(state.Cpuid, out int leaf);
            int xsaveLength = cpuid + state.Cpuid.Length + 4 + 8 + 4 + 144 + 312, xsave = xsaveLength + 4, bytes = state.Xsave.Length;
            Assert.That(cpuid, Is.Positive);
            Assert.That(BinaryPrimitives.ReadInt32BigEndian(stream.AsSpan(xsaveLength)), Is.EqualTo(bytes));
            int msrs = xsave + bytes + 392 + 4;
            Assert.That(BinaryPrimitives.ReadUInt32BigEndian(stream.AsSpan(msrs)), Is.EqualTo(state.MsrIndex[0]));
            return new Places(cpuid, cpuid + leaf * 40 + 20 + 3, xsaveLength, xsave, bytes, msrs);
        }

        private static void CpuidEntries(byte[] cpuid, out int leaf)
        {
            var entries = new KvmUapi.CpuidEntry2[cpuid.Length / 40];
            cpuid.CopyTo(Ioctl.AsBytes<KvmUapi.CpuidEntry2>(entries));
            leaf = Array.FindIndex(entries, static e => e.Function == 0x80000001);
        }
    }

    /// <summary>Sets bit 28 of ecx in leaf 0x80000001: performance counters of the last-level cache, which none of our guests has.</summary>
    private static byte[] WithFeature(byte[] stream)
    {
        byte[] changed = [.. stream];
        changed[Places.In(stream).FeatureByte] |= 0x10;
        return changed;
    }

    private static byte[] WithUnknownMsr(byte[] stream)
    {
        byte[] changed = [.. stream];
        BinaryPrimitives.WriteUInt32BigEndian(changed.AsSpan(Places.In(stream).MsrIndex), UnknownMsr);
        return changed;
    }

    private static byte[] WithLargerXsave(byte[] stream)
    {
        const int more = 4096;
        Places at = Places.In(stream);
        byte[] changed = [.. stream[..(at.Xsave + at.XsaveBytes)], .. new byte[more], .. stream[(at.Xsave + at.XsaveBytes)..]];
        BinaryPrimitives.WriteInt32BigEndian(changed.AsSpan(at.XsaveLength), at.XsaveBytes + more);
        return changed;
    }

    private static readonly (string Name, Func<byte[], byte[]> Change, string Message)[] s_states =
    [
        ("feature", WithFeature, "vCPU 0: the guest's CPU has features that this host lacks: perfctr_llc; CPUID 0x80000001.0 ecx bits 0x10000000"),
        ("register", WithUnknownMsr, "vCPU 0: this host does not know MSR 0x12345"),
        ("extended state", WithLargerXsave, "bytes of extended state exceed this host's"),
    ];

    [Test]
    public async Task A_state_of_a_greater_CPU_is_refused_before_the_guest_runs_and_stays_loadable_elsewhere()
    {
        KvmGuest.Require();
        string saved = Vmm["saved"];
        PeerProcess source = await Start("vm");
        MemCheckGuest.Found found = await Past(source, 2);
        await Vmm.Ok("migrate", "--vm", "vm", "--to", $"file:{saved}");
        await Vmm.Ok("quit", "--vm", "vm");
        byte[] stream = await File.ReadAllBytesAsync(saved), sent = await File.ReadAllBytesAsync(Vmm["serial"]);
        foreach ((string name, Func<byte[], byte[]> change, string message) in s_states)
        {
            byte[] changed = change(stream);
            string file = Vmm[$"changed {name}"];
            await File.WriteAllBytesAsync(file, changed);
            CliResult result = await Vmm.Run("run", "--accel", "kvm", "--memory", "3M", "--device", $"serial,output={Vmm["serial"]}", "--incoming", $"file:{file}");
            Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Failed, result.Error)), name);
            Assert.That(result.Error, Does.Contain("incoming migration failed: destination, ").And.Contains(message), name);
            Assert.That(await File.ReadAllBytesAsync(file), Is.EqualTo(changed), $"{name}: the file changed");
            Assert.That(await File.ReadAllBytesAsync(Vmm["serial"]), Is.EqualTo(sent), $"{name}: the guest ran");
        }
        CliResult twice = await Vmm.Run("run", "--accel", "kvm", "--cpus", "2", "--memory", "3M", "--device", $"serial,output={Vmm["serial"]}", "--incoming", $"file:{saved}");
        Assert.That((twice.Code, twice.Error), Is.EqualTo((ExitCode.Failed, twice.Error)));
        Assert.That(twice.Error, Does.Contain("vCPU 0: the guest has 1 vCPUs, this VM 2").And.Contains("make this VM with 1 vCPUs"));
        // This host has everything that the unchanged state needs.
        PeerProcess elsewhere = await Vmm.StartVmOf("elsewhere", "3M", "--accel", "kvm", "--device", $"serial,output={Vmm["serial"]}", "--incoming", $"file:{saved}");
        found = await Past(elsewhere, found.Rounds + 2);
        // The VM has no --kernel, and loadvm must not need one.
        await Vmm.Ok("savevm", "one", "--vm", "elsewhere");
        await Vmm.Ok("loadvm", "one", "--vm", "elsewhere");
        await Past(elsewhere, found.Rounds + 2);
    }

    [Test]
    public async Task A_snapshot_of_a_greater_CPU_is_refused_and_the_guest_runs_on_unhurt()
    {
        KvmGuest.Require();
        PeerProcess vm = await Start("vm");
        MemCheckGuest.Found found = await Past(vm, 2);
        await Vmm.Ok("savevm", "one", "--vm", "vm");
        string file = Directory.EnumerateFiles(Vmm["snapshots-vm"], "*", SearchOption.AllDirectories).MaxBy(static f => new FileInfo(f).Length)!;
        byte[] stream = await File.ReadAllBytesAsync(file);
        await Replace(file, stream, WithFeature(stream));
        CliResult refused = await Vmm.Run("loadvm", "one", "--vm", "vm");
        Assert.That((refused.Code, refused.Error), Is.EqualTo((ExitCode.Failed, refused.Error)));
        Assert.That(refused.Error, Does.Contain("the guest's CPU has features that this host lacks: perfctr_llc"));
        MemCheckGuest.Found later = await Past(vm, (await Read(vm)).Rounds + 2);
        await Replace(file, WithFeature(stream), stream);
        await Vmm.Ok("stop", "--vm", "vm");
        await Vmm.Ok("loadvm", "one", "--vm", "vm");
        Assert.That((await Read(vm)).Rounds, Is.InRange(found.Rounds, later.Rounds));
        await Vmm.Ok("cont", "--vm", "vm");
        await Past(vm, later.Rounds + 1);
    }

    /// <summary>Replaces the file's content and its checksum in the manifest.</summary>
    private static async Task Replace(string file, byte[] before, byte[] after)
    {
        await File.WriteAllBytesAsync(file, after);
        string folder = Path.GetDirectoryName(file)!, old = Convert.ToHexStringLower(SHA256.HashData(before));
        foreach (string manifest in Directory.EnumerateFiles(folder, "*", SearchOption.AllDirectories).Where(f => f != file))
        {
            string text = await File.ReadAllTextAsync(manifest, Encoding.UTF8);
            if (text.Contains(old, StringComparison.Ordinal)) await File.WriteAllTextAsync(manifest, text.Replace(old, Convert.ToHexStringLower(SHA256.HashData(after)), StringComparison.Ordinal));
        }
    }

    // Shell commands that change /dev/kvm in the program's own mount namespace.
    private const string Forbidden = "mount --bind /dev/kvm /dev/kvm && mount -o remount,bind,nodev /dev/kvm", NotKvm = "mount --bind /dev/null /dev/kvm",
        Missing = "mkdir -p \"$XDG_RUNTIME_DIR/dev\" && touch \"$XDG_RUNTIME_DIR/dev/null\" && mount --bind /dev/null \"$XDG_RUNTIME_DIR/dev/null\" && mount --rbind \"$XDG_RUNTIME_DIR/dev\" /dev";

    [TestCase("kvm", Forbidden, "cannot open '/dev/kvm': Permission denied", "adding it to the group 'kvm'")]
    [TestCase("auto", Forbidden, "cannot open '/dev/kvm': Permission denied", "adding it to the group 'kvm'")]
    [TestCase("kvm", Missing, "cannot open '/dev/kvm': No such file or directory", "load the kernel module kvm_intel or kvm_amd")]
    [TestCase("kvm", NotKvm, "'/dev/kvm' is not KVM", "run without KVM")]
    public async Task A_missing_or_forbidden_KVM_says_what_to_do(string accelerator, string mounts, string message, string advice)
    {
        using VmmCommands.Running run = Vmm.StartThrough(Namespace(), $"{mounts} && exec \"$@\"", "run", "--accel", accelerator, "--kernel", "builtin:memcheck", "--memory", "3M");
        CliResult result = await run.Finish();
        Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Failed, result.Error)));
        Assert.That(result.Error, Does.Contain(message).And.Contains(advice).And.Contains("--accel none"));
    }

    [Test]
    public async Task Auto_does_with_a_workload_where_there_is_no_KVM_and_says_so()
    {
        using VmmCommands.Running run = Vmm.StartThrough(Namespace(), $"{Forbidden} && exec \"$@\"", "run", "--name", "vm", "--accel", "auto", "--kernel", "builtin:memcheck", "--workload", "pattern,rate=1M", "--memory", "3M");
        await run.Line("ready:");
        string status = await Vmm.Ok("status", "--vm", "vm");
        run.Signal(SigTerm);
        CliResult result = await run.Finish();
        Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Ok, result.Error)));
        Assert.That(result.Error, Does.Contain("no guest runs, only the --workload: cannot open '/dev/kvm': Permission denied"));
        Assert.That(status, Does.Contain("running"));
    }

    [Test]
    public async Task A_workload_that_does_without_KVM_is_updated([Values] bool exec)
    {
        using VmmCommands.Running run = Vmm.StartThrough(Namespace(), $"{Forbidden} && exec \"$@\"", "run", "--name", "vm", "--accel", "auto", "--kernel", "builtin:memcheck", "--workload", "pattern,rate=1M", "--memory", "3M");
        await run.Line("ready:");
        await Vmm.Ok(["update", "--vm", "vm", .. exec ? (string[])["--exec"] : []]);
        Assert.That(await Vmm.Ok("status", "--vm", "vm"), Does.Contain("running"));
        await Vmm.Ok("quit", "--vm", "vm");
    }

    /// <summary>The command that starts a shell in its own mount namespace. CI must allow it.</summary>
    private static string[] Namespace()
    {
        if (!File.Exists(KvmSystem.DefaultPath)) KvmGuest.Require();
        string flags = PrivateDirectory.CurrentUserId == 0 ? "-m" : "-rm";
        (int status, _, string errors) = Shell.Run("unshare", flags, "mount", "--bind", "/dev/null", "/dev/null");
        if (status == 0) return ["unshare", flags, "sh"];
        string why = $"no mount namespace here: {errors.Trim()}";
        if (!string.IsNullOrEmpty(Environment.GetEnvironmentVariable("CI"))) Assert.Fail(why);
        Assert.Ignore(why);
        return [];
    }
}
