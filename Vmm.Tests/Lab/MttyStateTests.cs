using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Tests.Lab;

/// <summary>What mtty, the kernel's sample device with migration, does in each state (vfio-migration 1.7, 1.11 and 2).</summary>
[TestFixture(false, TestName = "MttyState(group)")]
[TestFixture(true, TestName = "MttyState(iommufd)")]
public sealed class MttyStateTests(bool iommufd) : LabFixture
{
    /// <summary>Sizes of mtty's state: its header, its ports, and both together.</summary>
    private const int HeaderBytes = 24, PortsBytes = 72, StateBytes = HeaderBytes + PortsBytes;

    private readonly KernelVfio _kernel = new();
    private LabVfio _lab = null!;
    private KernelVfioDeviceIo _mtty = null!, _other = null!;

    [OneTimeSetUp]
    public void Open()
    {
        IsInTheLab();
        _lab = new LabVfio();
        (_mtty, _other) = (_lab.Open(LabVfio.Mtty1, iommufd), _lab.Open(LabVfio.Mtty2, iommufd));
    }

    [SetUp]
    public void Reset() => Assert.That((_mtty.Reset(), _other.Reset()), Is.EqualTo((Errno.None, Errno.None)));

    [OneTimeTearDown]
    public void Close()
    {
        _mtty?.Reset();
        _other?.Reset();
        _lab?.Dispose();
    }

    [TestCase(VfioDeviceState.PreCopy)]
    [TestCase(VfioDeviceState.StopCopy)]
    [TestCase(VfioDeviceState.Resuming)]
    public void Spec2_TheDataDescriptorIsClosedOnExec(VfioDeviceState state)
    {
        using OwnedFd data = LabSession.Open(_mtty, state);
        string flags = File.ReadAllLines($"/proc/self/fdinfo/{data.Number}").Single(static l => l.StartsWith("flags:", StringComparison.Ordinal))[6..].Trim();
        Assert.That(Convert.ToInt32(flags, 8) & 0x80000 /* O_CLOEXEC */, Is.Not.Zero);
    }

    [Test]
    public void Spec2_TheDataDescriptorIsAStream()
    {
        using OwnedFd data = LabSession.Open(_mtty, VfioDeviceState.StopCopy);
        Assert.That((_kernel.PRead(data, new byte[8], 0, out Errno errno), errno), Is.EqualTo((-1, Errno.ESPIPE)));
        Assert.That((Posix.Seek(data, 0), Posix.LastError), Is.EqualTo((-1L, Errno.ESPIPE)));
        using OwnedFd loading = LabSession.Open(_other, VfioDeviceState.Resuming);
        Assert.That((_kernel.PWrite(loading, new byte[8], 0, out errno), errno), Is.EqualTo((-1, Errno.ESPIPE)));
    }

    [Test]
    public void Spec2_AtThePermanentEndPollSaysReadable()
    {
        using OwnedFd data = LabSession.Open(_mtty, VfioDeviceState.StopCopy);
        Assert.That(ReadToEnd(data), Is.EqualTo(StateBytes));
        Assert.That(Posix.Poll(data, Posix.POLLIN, null, 0, out _) & Posix.POLLIN, Is.EqualTo(Posix.POLLIN));
    }

    [Test]
    public void Spec2_PrecopyGivesTheHeaderThenPausesWithReadsOfNothingAndStopCopyGivesTheRest()
    {
        using OwnedFd data = LabSession.Open(_mtty, VfioDeviceState.PreCopy);
        Assert.That(ReadToEnd(data), Is.EqualTo(HeaderBytes));
        for (int i = 0; i < 2; i++) Assert.That((_kernel.Read(data, new byte[64], out Errno errno), errno), Is.EqualTo((0, Errno.None)), "the data ends for now");
        LabSession.Set(_mtty, VfioDeviceState.StopCopy);
        Assert.That(ReadToEnd(data), Is.EqualTo(PortsBytes));
    }

    [Test]
    public void Spec2_WhatDoesNotBelongToTheStateIsRefusedWhenItIsWritten()
    {
        byte[] state = new byte[StateBytes];
        using (OwnedFd data = LabSession.Open(_mtty, VfioDeviceState.StopCopy)) Assert.That(_kernel.Read(data, state, out _), Is.EqualTo(StateBytes));
        using (OwnedFd loading = LabSession.Open(_other, VfioDeviceState.Resuming))
        {
            Assert.That(_kernel.Write(loading, state, out Errno errno), Is.EqualTo(StateBytes), errno.ToString());
            Assert.That((_kernel.Write(loading, new byte[4096], out errno), errno), Is.EqualTo((-1, Errno.ENOMEM)), "the driver refuses more bytes than it expects");
        }
        Assert.That(_other.Reset(), Is.EqualTo(Errno.None));
        using (OwnedFd loading = LabSession.Open(_other, VfioDeviceState.Resuming))
        {
            state.AsSpan(0, 8).Fill(0xa5);
            Assert.That((_kernel.Write(loading, state, out Errno errno), errno), Is.EqualTo((-1, Errno.EFAULT)), "the driver refuses another magic");
        }
    }

    [Test]
    public void Spec2_StoppedTheConfigSpaceAndInterruptsStillAnswer()
    {
        LabSession.Set(_mtty, VfioDeviceState.Stop);
        byte[] command = new byte[2];
        Assert.That(_mtty.RegionRead(VfioPciRegion.Config, 4, command), Is.EqualTo(Errno.None));
        Assert.That(_mtty.RegionWrite(VfioPciRegion.Config, 4, command), Is.EqualTo(Errno.None));
        using OwnedFd fd = Posix.EventFd();
        Assert.That(_mtty.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionTrigger, VfioPciIrq.Intx, 0, 1), [], [fd]), Is.EqualTo(Errno.None));
        Assert.That(_mtty.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataNone | VfioIrqSetFlags.ActionTrigger, VfioPciIrq.Intx, 0, 0), [], []), Is.EqualTo(Errno.None));
        LabSession.Set(_mtty, VfioDeviceState.Running);
    }

    [Test]
    public void Spec2_TheErrorStateCannotBeAskedFor()
    {
        Assert.That(_mtty.SetMigrationState(VfioDeviceState.Error, out _), Is.EqualTo(Errno.EINVAL));
        Assert.That(LabSession.State(_mtty), Is.EqualTo(VfioDeviceState.Running));
    }

    [Test]
    public void Spec1_11_PrecopyInfoNeedsItsWholeStructureAndIsTheOnlyCallOnADataDescriptor()
    {
        using OwnedFd data = LabSession.Open(_mtty, VfioDeviceState.PreCopy);
        Errno Ask(uint request, uint argsz)
        {
            byte[] info = new byte[24];
            BitConverter.TryWriteBytes(info, argsz);
            _kernel.Ioctl(data, request, info, out Errno errno);
            return errno;
        }

        Assert.That(Ask(VfioUapi.VFIO_MIG_GET_PRECOPY_INFO, 24), Is.EqualTo(Errno.None));
        Assert.That(Ask(VfioUapi.VFIO_MIG_GET_PRECOPY_INFO, 16), Is.EqualTo(Errno.EINVAL));
        Assert.That(Ask(VfioUapi.VFIO_DEVICE_GET_INFO, 24), Is.EqualTo(Errno.ENOTTY));
    }

    [Test]
    public void Spec1_7_ASessionAfterAResetIsAnotherAndTheOldOneStaysDead()
    {
        using OwnedFd old = LabSession.Open(_mtty, VfioDeviceState.PreCopy);
        Assert.That(_mtty.Reset(), Is.EqualTo(Errno.None));
        using OwnedFd next = LabSession.Open(_mtty, VfioDeviceState.StopCopy);
        Assert.That(next.Number, Is.Not.EqualTo(old.Number));
        Assert.That((_kernel.Read(old, new byte[8], out Errno errno), errno), Is.EqualTo((-1, Errno.ENODEV)));
        Assert.That(ReadToEnd(next), Is.EqualTo(StateBytes));
    }

    private int ReadToEnd(OwnedFd data)
    {
        byte[] buffer = new byte[16];
        int total = 0;
        while (_kernel.Read(data, buffer, out Errno errno) is var n && n != 0)
        {
            Assert.That(errno, Is.EqualTo(Errno.None));
            total += n;
        }
        return total;
    }
}
