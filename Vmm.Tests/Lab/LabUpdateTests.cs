using System.Text.Json.Nodes;
using Microsoft.Extensions.Logging.Abstractions;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Tests.Lab;

/// <summary>
/// <c>vmm update</c> with a kernel device that does DMA. Each process makes only the expected calls, the device's files stay open, DMA goes on
/// while the addresses are suspended, and no interrupt is lost (vfio-migration 7.5, 7.6).
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
            Assert.That(SpinWait.SpinUntil(() => !LabOpenFiles.IsAlive(pid), Deadline), "the old process ends");
            AssertHasTheSameFiles(next);
            Assert.That(eventFds.Intersect(LabOpenFiles.EventFds(next).Keys), Is.Not.Empty, "the eventfds of the device's interrupts stay");
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
        // Chance decides whether the VM stops during a read or a write, so repeat until both have occurred.
        for (int i = 0; i < 12 && !(read && written); i++)
        {
            Trace.Clear();
            using var relay = new LabRelay(Vmm[$"vmm/{pid}.main"]);
            Task<JsonNode> updating = Update("--to-binary", program);
            await relay.Keep(() => Trace.Calls(pid).Contains(VfioUapi.VFIO_IOMMU_UNMAP_DMA), Deadline);
            long step = Ram.Word(Steps);
            Assert.That(SpinWait.SpinUntil(() => LabOpenFiles.EventFds(pid).Values.Any(static c => c > 0), Deadline), "the transfer in flight ends, and its interrupt stays in the eventfd");
            // Steps 1, 3, ... read memory and steps 2, 4, ... write it; the guest has counted the step before the transfer in flight.
            if (step % 2 == 0)
            {
                Assert.That(Ram.Read(2 * Page, TransferBytes), Is.EqualTo(Ram.Read(Page, TransferBytes)), "the device's write came while the addresses were suspended");
                written = true;
            }
            else
            {
                read = true;
            }
            AssertDeviceWrites(device, 5 + i);
            Assert.That(Ram.Word(Steps), Is.EqualTo(step), "the guest does not run during the update");
            await relay.Give();
            int next = (await updating)["pid"]!.GetValue<int>();
            WaitForSteps(6);
            AssertMoved(pid, next);
            pid = next;
        }
        Assert.That((read, written), Is.EqualTo((true, true)), "both directions of transfer were in flight at some update");
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
            Assert.That(eventFds.Intersect(LabOpenFiles.EventFds(Vm.Pid).Keys), Is.Not.Empty, "the eventfds of the device's interrupts stay");
            Assert.That(Changes(Vm.Pid), Is.EqualTo((uint[])[VfioUapi.VFIO_IOMMU_UNMAP_DMA, .. Enumerable.Repeat(VfioUapi.VFIO_IOMMU_MAP_DMA, Mappings)]), "one suspend, then one new address for each mapping");
        }
    }

    /// <summary>Asserts that the old process only suspended the addresses and that the new process only gave the kernel its own.</summary>
    private void AssertMoved(int old, int next)
    {
        Assert.That(Trace.IsComplete, "the trace names the process of every call");
        Assert.That(Changes(old), Is.EqualTo((uint[])[VfioUapi.VFIO_IOMMU_UNMAP_DMA]), "the old process");
        Assert.That(Changes(next), Is.EqualTo(Enumerable.Repeat(VfioUapi.VFIO_IOMMU_MAP_DMA, Mappings)), "the new process");
    }

    /// <summary>Asserts that the device can write its buffer to a free page, by this process's own descriptor for the device.</summary>
    private void AssertDeviceWrites(KernelVfioDeviceIo device, int page)
    {
        Assert.That(Ram.Read((long)page * Page, TransferBytes), Is.All.Zero);
        new LabEdu(device).CopyFromBuffer((ulong)page * Page, TransferBytes);
        Assert.That(Ram.Read((long)page * Page, TransferBytes), Is.EqualTo(Ram.Read(Page, TransferBytes)), "the device wrote its buffer");
    }
}
