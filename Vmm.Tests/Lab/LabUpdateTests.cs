using System.Text.Json.Nodes;
using Microsoft.Extensions.Logging.Abstractions;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Tests.Lab;

/// <summary>
/// <c>vmm update</c> with a device of the kernel under DMA: what each process asks of the kernel, that its files stay open, that DMA goes on while no
/// process has addresses, and that no interrupt is lost (vfio-migration 7.5, 7.6).
/// </summary>
[TestFixture]
public sealed class LabUpdateTests : LabUpdateFixture
{
    [Test]
    public async Task Spec7_ADeviceUnderDmaGoesFromProcessToProcessTenTimes()
    {
        int pid = Vm.Pid;
        var pauses = new List<double>();
        for (int i = 0; i < 10; i++)
        {
            int[] eventFds = [.. LabOpenFiles.EventFds(pid).Keys];
            Trace.Clear();
            JsonNode result = await Update();
            int next = result["pid"]!.GetValue<int>();
            pauses.Add(result["pause-ms"]!.GetValue<double>());
            Assert.That(next, Is.Not.EqualTo(pid));
            WaitForSteps(6);
            Assert.That(SpinWait.SpinUntil(() => !LabOpenFiles.IsAlive(pid), Deadline), "the old process is gone");
            AssertHasTheSameFiles(next);
            Assert.That(eventFds.Intersect(LabOpenFiles.EventFds(next).Keys), Is.Not.Empty, "the eventfds of its interrupts");
            AssertMoved(pid, next);
            pid = next;
        }
        pauses.Sort();
        await TestContext.Out.WriteLineAsync($"pause median {pauses[5]:0} ms, longest {pauses[^1]:0} ms; {Ram.Word(Steps)} interrupts");
    }

    [Test]
    public async Task Spec7_DmaGoesOnWhileNoProcessHasItsAddresses()
    {
        int pid = Vm.Pid;
        string program = Program(LabRelay.Script + "exec \"$VMM\" \"$@\"");
        using var device = new KernelVfioDeviceIo("edu", LabOpenFiles.Duplicate(pid, "[vfio-device]"), new KernelVfio(), null!, NullLogger.Instance, null);
        bool read = false, written = false;
        // Which of its transfers is under way when it stops is a matter of chance.
        for (int i = 0; i < 12 && !(read && written); i++)
        {
            Trace.Clear();
            using var relay = new LabRelay(Vmm[$"vmm/{pid}.main"]);
            Task<JsonNode> updating = Update("--to-binary", program);
            await relay.Keep(() => Trace.Calls(pid).Contains(VfioUapi.VFIO_IOMMU_UNMAP_DMA), Deadline);
            long step = Ram.Word(Steps);
            Assert.That(SpinWait.SpinUntil(() => LabOpenFiles.EventFds(pid).Values.Any(static c => c > 0), Deadline), "the transfer under way ends, and its interrupt waits in the eventfd");
            // The guest has counted the transfer before this one: steps 1, 3, ... fetch, 2, 4, ... bring back.
            if (step % 2 == 0)
            {
                Assert.That(Ram.Read(2 * Page, TransferBytes), Is.EqualTo(Ram.Read(Page, TransferBytes)), "what the device brought back, while nobody had addresses");
                written = true;
            }
            else
            {
                read = true;
            }
            AssertDeviceWrites(device, 5 + i);
            Assert.That(Ram.Word(Steps), Is.EqualTo(step), "nobody runs the guest");
            await relay.Give();
            int next = (await updating)["pid"]!.GetValue<int>();
            WaitForSteps(6);
            AssertMoved(pid, next);
            pid = next;
        }
        Assert.That((read, written), Is.EqualTo((true, true)), "transfers of both directions were under way");
    }

    [Test]
    public async Task Spec7_3_AProcessThatReplacesItselfKeepsItsDeviceUnderDma()
    {
        for (int i = 0; i < 3; i++)
        {
            int[] eventFds = [.. LabOpenFiles.EventFds(Vm.Pid).Keys];
            Trace.Clear();
            JsonNode result = await Update("--exec");
            Assert.That(result["pid"]!.GetValue<int>(), Is.EqualTo(Vm.Pid));
            WaitForSteps(6);
            AssertHasTheSameFiles(Vm.Pid);
            Assert.That(eventFds.Intersect(LabOpenFiles.EventFds(Vm.Pid).Keys), Is.Not.Empty, "the eventfds of its interrupts");
            Assert.That(Changes(Vm.Pid), Is.EqualTo((uint[])[VfioUapi.VFIO_IOMMU_UNMAP_DMA, .. Enumerable.Repeat(VfioUapi.VFIO_IOMMU_MAP_DMA, Mappings)]), "suspended once, then given anew");
        }
    }

    /// <summary>The old process suspended the addresses and changed nothing else; the new one told the kernel of its own and changed nothing else.</summary>
    private void AssertMoved(int old, int next)
    {
        Assert.That(Trace.IsComplete, "every call is somebody's");
        Assert.That(Changes(old), Is.EqualTo((uint[])[VfioUapi.VFIO_IOMMU_UNMAP_DMA]), "the old process");
        Assert.That(Changes(next), Is.EqualTo(Enumerable.Repeat(VfioUapi.VFIO_IOMMU_MAP_DMA, Mappings)), "the new process");
    }

    /// <summary>Has the device write its buffer into a page that nobody else touches, by a descriptor of its own.</summary>
    private void AssertDeviceWrites(KernelVfioDeviceIo device, int page)
    {
        Assert.That(Ram.Read((long)page * Page, TransferBytes), Is.All.Zero);
        new LabEdu(device).CopyFromBuffer((ulong)page * Page, TransferBytes);
        Assert.That(Ram.Read((long)page * Page, TransferBytes), Is.EqualTo(Ram.Read(Page, TransferBytes)), "what the device was given last, once more");
    }
}
