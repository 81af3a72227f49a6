using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Tests.Contract;

/// <summary>What every device, fake or real, answers to requests other than migration (vfio-migration 1.4 to 1.7, 1.11).</summary>
public abstract class VfioDeviceIoContract
{
    /// <summary>The device under test.</summary>
    private protected abstract IVfioDeviceIo Device { get; }

    /// <summary>Whether the device supports VFIO_DEVICE_RESET.</summary>
    protected abstract bool Resets { get; }

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
    public void Spec1_7_ResetAnswersAsTheDeviceCan() => Assert.That(Device.Reset(), Is.EqualTo(Resets ? Errno.None : Errno.EINVAL));

    [Test]
    public void Spec1_11_AnUnknownFeatureIsEnotty() =>
        Assert.That(Device.DeviceFeature((VfioDeviceFeature)0x7fff, VfioFeatureOp.Get, new byte[8]), Is.EqualTo(Errno.ENOTTY));
}
