using System.Buffers.Binary;
using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Tests.Support;

namespace Vmm.Tests.Lab;

/// <summary>vfio-pci with QEMU's edu behind an emulated Intel IOMMU: mappings, MSI, and the device's DMA.</summary>
[TestFixture(false, TestName = "Pci(group)")]
[TestFixture(true, TestName = "Pci(iommufd)")]
public sealed class PciDeviceTests(bool iommufd) : LabFixture
{
    private LabVfio _lab = null!;
    private KernelVfioDeviceIo _edu = null!;

    [SetUp]
    public void Open()
    {
        _lab = new LabVfio();
        _edu = _lab.Open(LabVfio.Edu, iommufd);
        new LabEdu(_edu).Enable();
    }

    [TearDown]
    public void Close()
    {
        _edu?.Dispose();
        _lab?.Dispose();
    }

    [Test]
    public void Spec1_5_ABarShowsTheSameMappedAndByCalls()
    {
        VfioRegionInfo bar = _edu.GetRegionInfo(0);
        Assert.That(bar.Areas, Has.Count.EqualTo(1));
        using MappedRegion? mapped = _edu.MapArea(0, bar.Areas[0]);
        byte[] called = new byte[4];
        Assert.That(_edu.RegionRead(0, 0, called), Is.EqualTo(Errno.None));
        Assert.That(BinaryPrimitives.ReadUInt32LittleEndian(called), Is.EqualTo(LabEdu.Identification));
        Assert.That(BinaryPrimitives.ReadUInt32LittleEndian(mapped!.Slice(0, 4)), Is.EqualTo(LabEdu.Identification));
    }

    [Test]
    public void Spec1_6_TheDevicesMsiArrivesAsAnEvent()
    {
        using OwnedFd fd = Posix.EventFd();
        Assert.That(_edu.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionTrigger, VfioPciIrq.Msi, 0, 1), [], [fd]), Is.EqualTo(Errno.None));
        new LabEdu(_edu).Raise();
        Assert.That(Posix.Poll(fd, Posix.POLLIN, null, 10_000, out _), Is.EqualTo(Posix.POLLIN));
    }

    /// <summary>An accelerator signals the unmask eventfd when the guest acknowledges; the kernel then checks the pin's level again.</summary>
    [Test]
    public void Spec1_6_AnEventfdUnmasksThePinWhichSignalsAgainWhileItIsUp()
    {
        using OwnedFd pin = Posix.EventFd(), unmask = Posix.EventFd(), other = Posix.EventFd();
        Assert.That(Pin(VfioIrqSetFlags.ActionTrigger, pin), Is.EqualTo(Errno.None));
        Assert.That((Pin(VfioIrqSetFlags.ActionUnmask, unmask), Pin(VfioIrqSetFlags.ActionUnmask, other)), Is.EqualTo((Errno.None, Errno.EBUSY)), "only one unmask eventfd at a time");
        var edu = new LabEdu(_edu);
        edu.Raise();
        Assert.That(Comes(pin, 10_000), "the pin signals");
        Assert.That(Comes(pin, 100), Is.False, "the signal masked the pin");
        Posix.SignalEventFd(unmask);
        Assert.That(Comes(pin, 10_000), "the pin is still high, so it signals again");
        edu.Acknowledge();
        Posix.SignalEventFd(unmask);
        Assert.That(Comes(pin, 500), Is.False, "the pin is low");
        Assert.That((Pin(VfioIrqSetFlags.ActionUnmask, null), Pin(VfioIrqSetFlags.ActionUnmask, other)), Is.EqualTo((Errno.None, Errno.None)));

        Errno Pin(VfioIrqSetFlags action, OwnedFd? fd) => _edu.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataEventFd | action, VfioPciIrq.Intx, 0, 1), [], [fd]);

        static bool Comes(OwnedFd fd, int waitMs)
        {
            if (Posix.Poll(fd, Posix.POLLIN, null, waitMs, out _) == 0) return false;
            Posix.DrainEventFd(fd);
            return true;
        }
    }

    [Test]
    public void Spec1_8_TheDeviceReadsAndWritesGuestRam()
    {
        byte[] sent = [.. Enumerable.Range(1, 64).Select(static i => (byte)i)];
        sent.CopyTo(_lab.Ram.Slice(0x1000, 64));
        new LabEdu(_edu).Copy(0x1000, 0x2000, 64);
        Assert.That(_lab.Ram.ReadOnlySlice(0x2000, 64).ToArray(), Is.EqualTo(sent));
    }

    [Test]
    public void Spec1_8_RamMappedLaterIsReachedTooAndTheIommusOwnRangeIsLeftOut()
    {
        RamBlock high = _lab.Memory.AddBlock(new RamBlockOptions { Name = "high", SizeBytes = 4 << 20 }, new GuestAddress(0xfed00000));
        Assert.That(((KernelContainer)_edu.Container).Mappings, Is.EqualTo((GuestRange[])
            [new(new(0), 1 << 20), new(new(0xfed00000), 0x100000), new(new(0xfef00000), 0x200000)]));
        _lab.Memory.RemoveBlock(high);
        Assert.That(((KernelContainer)_edu.Container).Mappings, Has.Count.EqualTo(1));
    }

    [Test]
    public void Spec1_9_Type1CallsEveryMappedPageDirtyAndAnIommuWithoutDirtyBitsHasNoLog()
    {
        Assert.That(_edu.Container.CanLogDirty, Is.EqualTo(!iommufd));
        if (iommufd) return;
        ulong[] bitmap = new ulong[4];
        Assert.That(_edu.Container.StartDirtyLog(), Is.EqualTo(Errno.None));
        for (int i = 0; i < 2; i++)
        {
            bitmap.AsSpan().Clear();
            Assert.That(_edu.Container.GetDirtyBitmap(_lab.Ram.Range, bitmap), Is.EqualTo(Errno.None));
            Assert.That(bitmap, Is.All.EqualTo(ulong.MaxValue));
        }
        Assert.That(_edu.Container.StopDirtyLog(), Is.EqualTo(Errno.None));
    }

    [Test]
    public void Spec1_11_ADeviceWithoutMigrationSaysEnotty() =>
        Assert.That(_edu.DeviceFeature(VfioDeviceFeature.Migration, VfioFeatureOp.Get, new byte[8]), Is.EqualTo(Errno.ENOTTY));

    [Test]
    public void Spec1_2_AnOpenDeviceIsBusForOthersEitherWay()
    {
        using var second = new LabVfio();
        foreach (bool way in (bool[])[false, true])
        {
            // The kernel refuses a second opener at the open or at the bind.
            VfioException e = Assert.Throws<VfioException>(() => second.Open(LabVfio.Edu, way))!;
            Assert.That(e.Errno, Is.EqualTo(iommufd && way ? Errno.EINVAL : Errno.EBUSY), e.Message);
        }
    }

    [Test]
    public void Spec3_1_ADeviceWithoutMigrationBlocksItsVm()
    {
        Close();
        using var vm = new TestVm(
            new VmOptions { Memory = [new RamBlockOptions { Name = "m", SizeBytes = 1 << 20 }], Devices = [DeviceOptions.Parse($"vfio-pci,id=edu0,sysfsdev={LabVfio.Edu},iommufd={(iommufd ? "on" : "off")}")] },
            static b => b.AddPlugin<VfioPlugin>());
        Assert.That(vm.Vm.Services.GetRequiredService<MigrationBlockers>().Reasons(MigrationMode.Normal), Has.Some.Contains("edu0").And.Some.Contains("migration"));
    }
}
