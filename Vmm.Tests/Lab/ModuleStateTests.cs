using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Tests.Contract;

namespace Vmm.Tests.Lab;

/// <summary>How the kernel's VFIO core handles migration states, seen in the log and the knobs of our module (vfio-migration 1.7, 1.11 and 2).</summary>
public sealed class ModuleStateTests : LabFixture
{
    private LabDevice? _lab;
    private LabVfio? _vfio;
    private KernelVfioDeviceIo? _device;

    [TearDown]
    public void Close()
    {
        _device?.Dispose();
        _vfio?.Dispose();
        _lab?.Dispose();
        (_device, _vfio, _lab) = (null, null, null);
    }

    [TestCase("v2", VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P | VfioMigrationFlags.PreCopy)]
    [TestCase("v2_nop2p", VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy)]
    [TestCase("v2_noprecopy", VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P)]
    [TestCase("v2_stopcopy", VfioMigrationFlags.StopCopy)]
    public void Spec2_TheKernelWalksTheStatesOfTheTable(string type, VfioMigrationFlags flags)
    {
        (LabDevice lab, KernelVfioDeviceIo device) = Open(type);
        byte[] state = new byte[8192];
        using (var data = LabSession.Open(device, VfioDeviceState.StopCopy)) state = state[..new KernelVfio().Read(data, state, out _)];
        foreach (TestCaseData request in VfioMigrationTable.Requests)
        {
            var (start, target) = ((VfioDeviceState)request.Arguments[0]!, (VfioDeviceState)request.Arguments[1]!);
            if (VfioMigrationTable.Path(start, target, flags) is not { } path) continue;
            Assert.That(device.Reset(), Is.EqualTo(Errno.None));
            if (start == VfioDeviceState.Resuming)
                using (var data = LabSession.Open(device, start)) Assert.That(new KernelVfio().Write(data, state, out _), Is.EqualTo(state.Length));
            else LabSession.Set(device, start);
            lab["log"] = 0;
            LabSession.Set(device, target);
            Assert.That(lab.States, Is.EqualTo(path.Select(static s => (int)s)), $"{start} to {target}");
        }
    }

    [Test]
    public void Spec2_OnlyAResetLeavesTheErrorState()
    {
        (LabDevice lab, KernelVfioDeviceIo device) = Open("v2");
        lab["broken"] = 1;
        Assert.That(LabSession.State(device), Is.EqualTo(VfioDeviceState.Error));
        foreach (VfioDeviceState target in (VfioDeviceState[])[VfioDeviceState.Running, VfioDeviceState.Stop, VfioDeviceState.StopCopy, VfioDeviceState.Resuming])
            Assert.That(device.SetMigrationState(target, out _), Is.Not.EqualTo(Errno.None), $"to {target}");
        Assert.That((device.Reset(), LabSession.State(device)), Is.EqualTo((Errno.None, VfioDeviceState.Running)));
    }

    [Test]
    public void Spec2_ARequestThatFailsHalfWayLeavesAnInteriorState()
    {
        (LabDevice lab, KernelVfioDeviceIo device) = Open("v2");
        lab["refuse"] = $"{(int)VfioDeviceState.Stop} {(int)VfioDeviceState.Resuming} {(int)Errno.EBUSY} 1";
        Assert.That(device.SetMigrationState(VfioDeviceState.Resuming, out _), Is.EqualTo(Errno.EBUSY));
        Assert.That(LabSession.State(device), Is.EqualTo(VfioDeviceState.Stop), "the kernel passes RUNNING_P2P and stays in STOP");
    }

    [Test]
    public void Spec2_AtItsEndStopCopyMustNotSayEnomsg()
    {
        (LabDevice lab, KernelVfioDeviceIo device) = Open("v2");
        lab["enomsg"] = 2;
        using var data = LabSession.Open(device, VfioDeviceState.StopCopy);
        byte[] buffer = new byte[8192];
        Assert.That(new KernelVfio().Read(data, buffer, out _), Is.Positive);
        Assert.That((new KernelVfio().Read(data, buffer, out Errno errno), errno), Is.EqualTo((-1, Errno.ENOMSG)), "the module gives ENOMSG in STOP_COPY");
    }

    [Test]
    public void Spec1_11_ALogCanStartAndStopAndStillFailItsReports()
    {
        (LabDevice lab, KernelVfioDeviceIo device) = Open("v2", log: true);
        lab["dma_log_errno"] = (int)Errno.EOPNOTSUPP;
        Assert.That(device.StartDmaLog(4096, [_vfio!.Ram.Range], out _), Is.EqualTo(Errno.None));
        Assert.That(device.ReportDmaLog(_vfio!.Ram.Range, 4096, new ulong[4]), Is.EqualTo(Errno.EOPNOTSUPP));
        Assert.That(device.StopDmaLog(), Is.EqualTo(Errno.None));
    }

    [Test]
    public void Spec1_7_TheStateOfThisDriverDoesNotSurviveACloseButItsReasonToRefuseAResetDoes()
    {
        (LabDevice lab, KernelVfioDeviceIo device) = Open("v2");
        using (LabSession.Open(device, VfioDeviceState.PreCopy)) lab["refuse_reset"] = 1;
        Assert.That((device.Reset(), LabSession.State(device)), Is.EqualTo((Errno.EIO, VfioDeviceState.PreCopy)));
        device.Dispose();
        _device = device = _vfio!.Open(lab.Path, iommufd: true);
        Assert.That((device.StateAtOpen, device.Reset()), Is.EqualTo(((VfioDeviceState?)VfioDeviceState.Running, Errno.None)));
    }

    private (LabDevice Lab, KernelVfioDeviceIo Device) Open(string type, bool log = false)
    {
        _lab = new LabDevice(type);
        if (log) _lab["dma_log"] = 1;
        _vfio = new LabVfio();
        _device = _vfio.Open(_lab.Path, iommufd: true);
        return (_lab, _device);
    }
}
