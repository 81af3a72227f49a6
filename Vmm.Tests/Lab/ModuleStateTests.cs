using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Io;
using Vmm.Tests.Contract;

namespace Vmm.Tests.Lab;

/// <summary>What the kernel's core does with a device's states, as our module's log and knobs show it (spec vfio-migration 1.7, 1.11 and 2).</summary>
public sealed class ModuleStateTests : LabFixture
{
    private LabDevice _lab = null!;
    private LabVfio _vfio = null!;
    private KernelVfioDeviceIo _device = null!;

    [TearDown]
    public void Close()
    {
        _device?.Dispose();
        _vfio?.Dispose();
        _lab?.Dispose();
    }

    [TestCase("v2", VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P | VfioMigrationFlags.PreCopy)]
    [TestCase("v2_nop2p", VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy)]
    [TestCase("v2_noprecopy", VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P)]
    [TestCase("v2_stopcopy", VfioMigrationFlags.StopCopy)]
    public void Spec2_TheKernelWalksTheStatesOfTheTable(string type, VfioMigrationFlags flags)
    {
        Open(type);
        byte[] state = new byte[8192];
        using (var data = LabSession.Open(_device, VfioDeviceState.StopCopy)) state = state[..new KernelVfio().Read(data, state, out _)];
        foreach (TestCaseData request in VfioMigrationTable.Requests)
        {
            var (start, target) = ((VfioDeviceState)request.Arguments[0]!, (VfioDeviceState)request.Arguments[1]!);
            if (VfioMigrationTable.Path(start, target, flags) is not { } path) continue;
            Assert.That(_device.Reset(), Is.EqualTo(Errno.None));
            if (start == VfioDeviceState.Resuming)
                using (var data = LabSession.Open(_device, start)) Assert.That(new KernelVfio().Write(data, state, out _), Is.EqualTo(state.Length));
            else LabSession.Set(_device, start);
            _lab["log"] = 0;
            LabSession.Set(_device, target);
            Assert.That(_lab.States, Is.EqualTo(path.Select(static s => (int)s)), $"{start} to {target}");
        }
    }

    [Test]
    public void Spec2_OnlyAResetLeavesTheErrorState()
    {
        Open("v2");
        _lab["broken"] = 1;
        Assert.That(LabSession.State(_device), Is.EqualTo(VfioDeviceState.Error));
        foreach (VfioDeviceState target in (VfioDeviceState[])[VfioDeviceState.Running, VfioDeviceState.Stop, VfioDeviceState.StopCopy, VfioDeviceState.Resuming])
            Assert.That(_device.SetMigrationState(target, out _), Is.Not.EqualTo(Errno.None), $"to {target}");
        Assert.That((_device.Reset(), LabSession.State(_device)), Is.EqualTo((Errno.None, VfioDeviceState.Running)));
    }

    [Test]
    public void Spec2_ARequestThatFailsHalfWayLeavesAnInteriorState()
    {
        Open("v2");
        _lab["refuse"] = $"{(int)VfioDeviceState.Stop} {(int)VfioDeviceState.Resuming} {(int)Errno.EBUSY} 1";
        Assert.That(_device.SetMigrationState(VfioDeviceState.Resuming, out _), Is.EqualTo(Errno.EBUSY));
        Assert.That(LabSession.State(_device), Is.EqualTo(VfioDeviceState.Stop), "RUNNING_P2P and STOP were passed");
    }

    [Test]
    public void Spec2_AtItsEndStopCopyMustNotSayEnomsg()
    {
        Open("v2");
        _lab["enomsg"] = 2;
        using var data = LabSession.Open(_device, VfioDeviceState.StopCopy);
        byte[] buffer = new byte[8192];
        Assert.That(new KernelVfio().Read(data, buffer, out _), Is.Positive);
        Assert.That((new KernelVfio().Read(data, buffer, out Errno errno), errno), Is.EqualTo((-1, Errno.ENOMSG)), "the module can be that bad");
    }

    [Test]
    public void Spec1_11_ALogCanStartAndStopAndStillFailItsReports()
    {
        _lab = new LabDevice("v2");
        (_lab["dma_log"], _lab["dma_log_errno"]) = (1, (int)Errno.EOPNOTSUPP);
        Open(null);
        Assert.That(_device.StartDmaLog(4096, [_vfio.Ram.Range], out _), Is.EqualTo(Errno.None));
        Assert.That(_device.ReportDmaLog(_vfio.Ram.Range, 4096, new ulong[4]), Is.EqualTo(Errno.EOPNOTSUPP));
        Assert.That(_device.StopDmaLog(), Is.EqualTo(Errno.None));
    }

    [Test]
    public void Spec1_7_TheStateOfThisDriverDoesNotSurviveACloseButItsReasonToRefuseAResetDoes()
    {
        Open("v2");
        using (LabSession.Open(_device, VfioDeviceState.PreCopy)) _lab["refuse_reset"] = 1;
        Assert.That((_device.Reset(), LabSession.State(_device)), Is.EqualTo((Errno.EIO, VfioDeviceState.PreCopy)));
        _device.Dispose();
        _device = _vfio.Open(_lab.Path, iommufd: true);
        Assert.That((_device.StateAtOpen, _device.Reset()), Is.EqualTo(((VfioDeviceState?)VfioDeviceState.Running, Errno.None)));
    }

    private void Open(string? type)
    {
        _lab ??= new LabDevice(type!);
        _vfio = new LabVfio();
        _device = _vfio.Open(_lab.Path, iommufd: true);
    }
}
