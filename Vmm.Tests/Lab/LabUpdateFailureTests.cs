using System.Diagnostics;
using System.Globalization;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Uapi;
using Vmm.Tests.Fakes;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Lab;

/// <summary>
/// The new process of an update fails at each step. The old process keeps its device, gives the kernel its addresses again if they were
/// suspended, and runs on; DMA and interrupts go on too (vfio-migration 7.5).
/// </summary>
[TestFixture]
public sealed class LabUpdateFailureTests : LabUpdateFixture
{
    private const int SigKill = 9;

    private static IEnumerable<TestCaseData> Failures()
    {
        yield return new TestCaseData("exit 3", "exit code 3").SetArgDisplayNames("ends at once");
        yield return new TestCaseData(
            "\"$VMM\" \"$@\" & new=$!; until ls -l /proc/$new/fd 2>&1 | grep -q memfd:vmm-ram-ticks; do kill -0 $new || exit 9; done; kill -9 $new; exit 7", "exit code 7")
            .SetArgDisplayNames("killed when it has the descriptors");
        yield return new TestCaseData("for a; do shift; [ \"$a\" = scratch ] && a=ticker,block=ticks,id=other; set -- \"$@\" \"$a\"; done; exec \"$VMM\" \"$@\"", "scratch")
            .SetArgDisplayNames("does not know a section");
    }

    [TestCaseSource(nameof(Failures))]
    public async Task Spec8_15_WhenTheNewProcessFailsTheOldOneGoesOn(string script, string reason)
    {
        using var ticks = new LabRam(Vm.Pid, "ticks");
        CliResult result = await Vmm.Run("update", "--vm", "a", "--to-binary", Program(script), "--timeout", $"{Deadline.TotalSeconds}");
        Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Failed, result.Error)));
        Assert.That(result.Error, Does.Contain(reason));
        await AssertGoesOn();
        await TestContext.Out.WriteLineAsync($"the guest's longest pause: {ticks.Word(1) / 1e6:0} ms");
        await AssertUpdates();
    }

    public enum Step
    {
        /// <summary>The old process has suspended its addresses, and the new process has no state yet.</summary>
        Suspended,

        /// <summary>The new process has given the kernel its own addresses.</summary>
        Taken,
    }

    [TestCase(Step.Suspended)]
    [TestCase(Step.Taken)]
    public async Task Spec8_15_KilledTheNewProcessKeepsNoAddresses(Step step)
    {
        using (var relay = new LabRelay(Vmm[$"vmm/{Vm.Pid}.main"]))
        {
            string program = Program($"echo $$ > {Vmm["pid"]}\n{LabRelay.Script}exec \"$VMM\" \"$@\"");
            Task<CliResult> updating = Vmm.Run("update", "--vm", "a", "--to-binary", program, "--timeout", $"{Deadline.TotalSeconds}");
            await relay.Keep(() => Trace.Calls(Vm.Pid).Contains(VfioUapi.VFIO_IOMMU_UNMAP_DMA), Deadline);
            int next = int.Parse(await File.ReadAllTextAsync(Vmm["pid"]), CultureInfo.InvariantCulture);
            if (step == Step.Taken)
            {
                await relay.Give(withoutLast: 1);
                Assert.That(SpinWait.SpinUntil(() => Trace.Calls(next).Count(static c => c == VfioUapi.VFIO_IOMMU_MAP_DMA) == Mappings, Deadline), "the new process gives the kernel its addresses");
            }
            Trace.Clear();
            long from = Ram.Word(Steps), start = Stopwatch.GetTimestamp();
            Posix.Kill(next, SigKill);
            Assert.That(SpinWait.SpinUntil(() => Ram.Word(Steps) > from, Deadline), "an interrupt was lost");
            await TestContext.Out.WriteLineAsync($"the guest runs {Stopwatch.GetElapsedTime(start).TotalMilliseconds:0} ms after the new process was killed");
            CliResult result = await updating;
            Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Failed, result.Error)));
            Assert.That(result.Error, Does.Contain("exit code 137"));
        }
        uint[] each = step == Step.Suspended ? [VfioUapi.VFIO_IOMMU_MAP_DMA] : [VfioUapi.VFIO_IOMMU_MAP_DMA, VfioUapi.VFIO_IOMMU_UNMAP_DMA, VfioUapi.VFIO_IOMMU_MAP_DMA];
        Assert.That(Changes(Vm.Pid), Is.EqualTo(Enumerable.Repeat(each, Mappings).SelectMany(static c => c)), "the old process gives the kernel its addresses again");
        await AssertGoesOn();
        await AssertUpdates();
    }

    [Test]
    public async Task Spec8_15_ANewProcessThatIsLateLosesTheDeviceToTheOldOne()
    {
        using (var relay = new LabRelay(Vmm[$"vmm/{Vm.Pid}.main"]))
        {
            Task<CliResult> updating = Vmm.Run("update", "--vm", "a", "--to-binary", Program($"{LabRelay.Script}exec \"$VMM\" \"$@\""), "--timeout", "60");
            await relay.Keep(() => Trace.Calls(Vm.Pid).Contains(VfioUapi.VFIO_IOMMU_UNMAP_DMA), Deadline);
            CliResult result = await updating;
            Assert.That((result.Code, result.Error), Is.EqualTo((ExitCode.Failed, result.Error)));
            Assert.That(result.Error, Does.Contain("not ready within 60000 ms"));
        }
        await AssertGoesOn();
        await AssertUpdates();
    }

    private async Task AssertGoesOn()
    {
        Assert.That(await Vmm.State(Vm), Is.EqualTo("running"), Vm.Errors);
        Assert.That(await VmPid(), Is.EqualTo(Vm.Pid));
        WaitForSteps(6);
        AssertHasTheSameFiles(Vm.Pid);
    }

    /// <summary>Asserts that a further update, to a working program, succeeds.</summary>
    private async Task AssertUpdates()
    {
        await Update();
        WaitForSteps(6);
        AssertHasTheSameFiles(await VmPid());
    }
}
