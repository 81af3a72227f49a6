using System.Text.Json.Nodes;
using Vmm.Core.Interop;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Lab;

/// <summary>
/// A VM in its own process whose guest keeps the lab's edu busy: the interrupt of each DMA transfer starts the next one, and every second
/// transfer writes to memory. The tests update this VM with <c>vmm update</c>.
/// </summary>
[Category(Slow)]
public abstract class LabUpdateFixture : LabFixture
{
    private protected const int Steps = 0, WrongPages = 1, LongestGap = 3, Page = 4096, TransferBytes = 2048;
    /// <summary>The VM has two blocks of RAM, and each needs one mapping.</summary>
    private protected const int Mappings = 2;

    private protected static readonly TimeSpan Deadline = TimeSpan.FromSeconds(240);
    private OwnedFd[] _files = [];

    /// <summary>The names that container, group and device have in /proc/PID/fd.</summary>
    private static string[] Files => ["/dev/vfio/vfio", $"/dev/vfio/{Group}", "[vfio-device]"];

    private static string Group => Path.GetFileName(File.ResolveLinkTarget(Path.Combine(LabVfio.Edu, "iommu_group"), true)!.FullName);

    private protected VmmCommands Vmm { get; private set; } = null!;

    private protected PeerProcess Vm { get; private set; } = null!;

    private protected LabTrace Trace { get; private set; } = null!;

    /// <summary>The RAM block with the guest's counters and its DMA pages.</summary>
    private protected LabRam Ram { get; private set; } = null!;

    [SetUp]
    public async Task StartVm()
    {
        Trace = new LabTrace();
        Vmm = new VmmCommands { StartDeadline = Deadline, CommandDeadline = Deadline + Deadline };
        Vm = await Vmm.StartVmOf("a", "1M,id=edu", "--memory", "1M,id=ticks", "--device", "ticker,block=ticks", "--device", "scratch",
            "--device", $"vfio-pci,id=edu,host={Path.GetFileName(LabVfio.Edu)},iommufd=off", "--device", $"edu-guest,bytes={TransferBytes}");
        Ram = new LabRam(Vm.Pid, "edu");
        _files = [.. Files.Select(f => LabOpenFiles.Duplicate(Vm.Pid, f))];
        WaitForSteps(4);
    }

    [TearDown]
    public async Task EndVm()
    {
        Trace?.Dispose();
        foreach (OwnedFd one in _files) one.Dispose();
        _files = [];
        Ram?.Dispose();
        // A process that a failed test left behind would keep the device. This test's folder in the command line identifies its processes.
        foreach (int pid in LabOpenFiles.Processes(Path.GetDirectoryName(Vmm["a"])!))
        {
            Posix.Kill(pid, 9);
            SpinWait.SpinUntil(() => !LabOpenFiles.IsAlive(pid), Deadline);
        }
        await Vmm.DisposeAsync();
    }

    /// <summary>Waits until the guest has done this many more steps.</summary>
    private protected void WaitForSteps(int more)
    {
        long from = Ram.Word(Steps);
        Assert.That(SpinWait.SpinUntil(() => Ram.Word(Steps) >= from + more, Deadline), $"an interrupt was lost: the guest stands at step {Ram.Word(Steps)}");
        Assert.That(Ram.Word(WrongPages), Is.Zero, "edu returned wrong data in some pages");
    }

    /// <summary>Runs <c>vmm update</c> and expects success.</summary>
    private protected async Task<JsonNode> Update(params string[] more)
    {
        CliResult result = await Vmm.Run(["update", "--vm", "a", "--json", "--timeout", $"{Deadline.TotalSeconds}", .. more]);
        Assert.That(result.Code, Is.EqualTo(ExitCode.Ok), $"{result.Error}; the VM's processes: {Vm.Errors}");
        JsonNode updated = JsonNode.Parse(result.Out)!;
        await TestContext.Progress.WriteLineAsync($"process {updated["pid"]}, pause {updated["pause-ms"]} ms, {updated["total-ms"]} ms in all, {Ram.Word(Steps)} steps");
        return updated;
    }

    /// <summary>The calls of a process that change device, container or mappings.</summary>
    private protected uint[] Changes(int pid) => [.. Trace.Calls(pid).Where(LabTrace.Changes.Contains)];

    /// <summary>The process that runs the VM now.</summary>
    private protected async Task<int> VmPid() => JsonNode.Parse(await Vmm.Ok("list", "--json"))![0]!["pid"]!.GetValue<int>();

    /// <summary>Writes a shell script that takes the place of the new <c>vmm</c>; it finds the program in <c>$VMM</c> and <c>$@</c>.</summary>
    private protected string Program(string script)
    {
        string path = Vmm["next"];
        (string file, string[] prefix) = PeerProcess.Self();
        File.WriteAllText(path, $"#!/bin/sh\nVMM='{file}'\n{string.Concat(prefix.Select(static p => $"set -- '{p}' \"$@\"\n"))}{script}\n");
        File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        return path;
    }

    /// <summary>Asserts that a process has the same open files for container, group and device as the first process.</summary>
    private protected void AssertHasTheSameFiles(int pid)
    {
        for (int i = 0; i < _files.Length; i++) Assert.That(LabOpenFiles.Has(pid, Files[i], _files[i]), $"process {pid} has the same {Files[i]}");
    }
}
