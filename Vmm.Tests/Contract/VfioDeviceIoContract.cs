using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Io;

namespace Vmm.Tests.Contract;

/// <summary>What every device answers apart from its migration (spec vfio-migration 1.4 to 1.7, 1.11), whoever plays it.</summary>
public abstract class VfioDeviceIoContract
{
    /// <summary>The device.</summary>
    protected abstract IVfioDeviceIo Device { get; }

    /// <summary>Whether it answers VFIO_DEVICE_RESET.</summary>
    protected abstract bool Resets { get; }

    /// <summary>An interrupt index with an eventfd that the kernel signals when told to; null: none can be triggered.</summary>
    protected abstract uint? TriggerIrq { get; }

    [Test]
    public void Spec1_5_ARegionBeyondTheLastIsAbsent()
    {
        Assert.That(Device.GetRegionInfo(Device.Info.RegionCount).IsPresent, Is.False);
        Assert.That(Device.GetRegionInfo(uint.MaxValue).IsPresent, Is.False);
    }

    [Test]
    public void Spec1_5_ConfigSpaceIsThereAndCanBeReadAndWritten()
    {
        VfioRegionInfo config = Device.GetRegionInfo(VfioPciRegion.Config);
        Assert.That((config.IsPresent, config.Flags & (VfioRegionFlags.Read | VfioRegionFlags.Write)), Is.EqualTo((true, VfioRegionFlags.Read | VfioRegionFlags.Write)));
        byte[] command = new byte[2];
        Assert.That(Device.RegionRead(VfioPciRegion.Config, 4, command), Is.EqualTo(Errno.None));
        Assert.That(Device.RegionWrite(VfioPciRegion.Config, 4, command), Is.EqualTo(Errno.None));
    }

    [Test]
    public void Spec1_6_AnInterruptIndexBeyondTheLastHasNoVectors()
    {
        Assert.That(Device.GetIrqInfo(Device.Info.IrqCount).Count, Is.Zero);
        Assert.That(Device.GetIrqInfo(uint.MaxValue).Count, Is.Zero);
    }

    [Test]
    public void Spec1_6_AnEventFdIsSignalledByATriggerUntilItsIndexIsDisabled()
    {
        if (TriggerIrq is not { } index) { Assert.Pass("nothing to trigger"); return; }
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

    [Test]
    public void Spec1_7_ResetAnswersAsTheDeviceCan() => Assert.That(Device.Reset(), Is.EqualTo(Resets ? Errno.None : Errno.EINVAL));

    [Test]
    public void Spec1_11_AnUnknownFeatureIsEnotty() =>
        Assert.That(Device.DeviceFeature((VfioDeviceFeature)0x7fff, VfioFeatureOp.Get, new byte[8]), Is.EqualTo(Errno.ENOTTY));
}
