using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Tests.Contract;

namespace Vmm.Tests.Lab;

/// <summary>The device io contract on real devices, each opened through group and container and through cdev and iommufd.</summary>
[Category(LabFixture.Category), NonParallelizable]
public abstract class LabDeviceIoContract(bool iommufd) : VfioDeviceIoContract
{
    private LabVfio _lab = null!;
    private KernelVfioDeviceIo _device = null!;

    private protected override IVfioDeviceIo Device => _device;

    protected abstract string Path { get; }

    /// <summary>The interrupt index whose eventfd the kernel signals when SET_IRQS asks for a trigger.</summary>
    protected abstract uint TriggerIrq { get; }

    [OneTimeSetUp]
    public void Open()
    {
        LabFixture.Need();
        _lab = new LabVfio();
        _device = _lab.Open(Path, iommufd);
    }

    [OneTimeTearDown]
    public void Close()
    {
        _device?.Dispose();
        _lab?.Dispose();
    }

    [Test]
    public void Spec1_6_AnEventFdIsSignalledByATriggerUntilItsIndexIsDisabled()
    {
        uint index = TriggerIrq;
        Assert.That(Device.GetIrqInfo(index).Flags & VfioIrqInfoFlags.EventFd, Is.EqualTo(VfioIrqInfoFlags.EventFd));
        using OwnedFd fd = Posix.EventFd();
        Assert.That(Device.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionTrigger, index, 0, 1), [], [fd]), Is.EqualTo(Errno.None));
        var fire = new VfioIrqSet(VfioIrqSetFlags.DataNone | VfioIrqSetFlags.ActionTrigger, index, 0, 1);
        Assert.That(Device.SetIrqs(fire, [], []), Is.EqualTo(Errno.None));
        Assert.That(Posix.Poll(fd, Posix.POLLIN, null, 10_000, out _), Is.EqualTo(Posix.POLLIN));
        Posix.DrainEventFd(fd);
        Assert.That(Device.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataNone | VfioIrqSetFlags.ActionTrigger, index, 0, 0), [], []), Is.EqualTo(Errno.None), "disable");
        Device.SetIrqs(fire, [], []);
        Assert.That(Posix.Poll(fd, Posix.POLLIN, null, 0, out _), Is.Zero);
    }
}

[TestFixture(false, TestName = "MttyIo(group)")]
[TestFixture(true, TestName = "MttyIo(iommufd)")]
public sealed class MttyDeviceIoContract(bool iommufd) : LabDeviceIoContract(iommufd)
{
    protected override string Path => LabVfio.Mtty1;

    protected override bool Resets => true;

    protected override uint TriggerIrq => VfioPciIrq.Intx;

    [Test]
    public void Spec1_4_TheResetFlagIsAdvisory() => Assert.That(Device.Info, Is.EqualTo(new VfioDeviceInfo(SupportsReset: false, IsPci: true, RegionCount: 9, IrqCount: 5)));

    [Test]
    public void Spec1_6_IndicesThatTheDriverDoesNotKnowAreAbsent()
    {
        Assert.That(Enumerable.Range(0, 5).Select(i => Device.GetIrqInfo((uint)i)), Is.EqualTo((VfioIrqInfo[])
            [new((VfioIrqInfoFlags)7, 1), new((VfioIrqInfoFlags)9, 1), default, default, default]));
    }
}

[TestFixture(false, TestName = "EduIo(group)")]
[TestFixture(true, TestName = "EduIo(iommufd)")]
public sealed class EduDeviceIoContract(bool iommufd) : LabDeviceIoContract(iommufd)
{
    protected override string Path => LabVfio.Edu;

    protected override bool Resets => false;

    protected override uint TriggerIrq => VfioPciIrq.Msi;

    [Test]
    public void Spec1_4_AFunctionWithoutFlrHasNoResetFlag() => Assert.That(Device.Info.SupportsReset, Is.False);
}

[TestFixture(false, TestName = "E1000eIo(group)")]
[TestFixture(true, TestName = "E1000eIo(iommufd)")]
public sealed class E1000eDeviceIoContract(bool iommufd) : LabDeviceIoContract(iommufd)
{
    protected override string Path => LabVfio.E1000e;

    protected override bool Resets => true;

    protected override uint TriggerIrq => VfioPciIrq.Msix;

    [Test]
    public void Spec1_4_AFunctionThatResetsSaysSo() => Assert.That(Device.Info.SupportsReset);

    [Test]
    public void Spec1_5_TheBarWithTheMsixTableIsMappable()
    {
        VfioRegionInfo[] bars = [.. Enumerable.Range(0, 6).Select(i => Device.GetRegionInfo((uint)i)).Where(static r => r.IsMsixMappable)];
        Assert.That(bars, Is.Not.Empty);
        Assert.That(bars[0].Areas, Is.EqualTo((VfioRegionArea[])[new(0, bars[0].SizeBytes)]));
    }
}
