using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.RawVfioUserClient;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>Device, region and interrupt queries, and interrupts (vfio-user 3.1 to 3.5, 5).</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
internal sealed class QueryAndIrqTests : FakeServerFixture
{
    private const uint Intx = 0, Msi = 1, Msix = 2, Err = 3;

    [Test]
    public void S10_InfoIsResetAndPciWithNineRegionsAndFiveIrqs([Values(16, 32)] int argsz)
    {
        Assert.That(Client.Ok(VfioUserCommand.DeviceGetInfo, Bytes(argsz, 0, 0, 0)), Is.EqualTo(Bytes(16, 3, 9, 5)));
        Client.Invalid(VfioUserCommand.DeviceGetInfo, 15, 0, 0, 0);
        Client.Invalid(VfioUserCommand.DeviceGetInfo, 16, 0, 0);
        Client.Ok(VfioUserCommand.DeviceReset, []);
    }

    [Test]
    public void S11_AbsentRegionsAreEmptyAndNoError()
    {
        foreach (uint index in (uint[])[3, 4, 5, 6, 8])
            Assert.That(Client.Ok(VfioUserCommand.DeviceGetRegionInfo, Bytes(32, 0, index, 0, 0UL, 0UL)), Is.EqualTo(Bytes(32, 0, index, 0, 0UL, 0UL)));
        Client.Invalid(VfioUserCommand.DeviceGetRegionInfo, 32, 0, 9, 0, 0UL, 0UL);
        Client.Invalid(VfioUserCommand.DeviceGetRegionInfo, 32, 0, uint.MaxValue, 0, 0UL, 0UL);
        Client.Invalid(VfioUserCommand.DeviceGetRegionInfo, 31, 0, 0, 0, 0UL, 0UL);
        Client.Invalid(VfioUserCommand.DeviceGetRegionInfo, 32, 0, 0, 0, 0UL);
    }

    [Test]
    public void S12_AWhollyMappableRegionHasItsDescriptorAtOnce()
    {
        using VfioUserReply reply = Client.Ask(VfioUserCommand.DeviceGetRegionInfo, Bytes(32, 0, FakeVfioUserBackend.Whole, 0, 0UL, 0UL));
        Assert.That(reply.Payload, Is.EqualTo(Bytes(32, 7, FakeVfioUserBackend.Whole, 0, 0x4000UL, 0UL)));
        Assert.That(reply.Fds, Has.Count.EqualTo(1));
        using var map = MapAll(reply.Fds[0]);
        map.Slice(0x2000, 4).Fill(0xa5);
        Assert.That(Client.Read32(FakeVfioUserBackend.Whole, 0x2000), Is.EqualTo(0xa5a5a5a5));
    }

    [Test]
    public void S12_SparseAreasTakeTwoStepsAndTheReplyFitsWhatWasAsked([Values(true, false)] bool padded)
    {
        byte[] first = Bytes(32, 0, FakeVfioUserBackend.Sparse, 0, 0UL, 0UL);
        using VfioUserReply shortReply = Client.Ask(VfioUserCommand.DeviceGetRegionInfo, first);
        Assert.That(shortReply.Payload, Is.EqualTo(Bytes(80, 7, FakeVfioUserBackend.Sparse, 0, 0x4000UL, 0UL)));
        Assert.That(shortReply.Fds, Is.Empty);
        byte[] second = Bytes(80, 0, FakeVfioUserBackend.Sparse, 0, 0UL, 0UL, new byte[padded ? 48 : 0]);
        using VfioUserReply full = Client.Ask(VfioUserCommand.DeviceGetRegionInfo, second);
        Assert.That(full.Payload, Is.EqualTo(Bytes(80, 15, FakeVfioUserBackend.Sparse, 32, 0x4000UL, 0UL, 0x10001, 0, 2, 0, 0x1000UL, 0x1000UL, 0x3000UL, 0x1000UL)));
        Assert.That(full.Fds, Has.Count.EqualTo(1));
    }

    [Test]
    public void S13_ThereAreNoIoEventFds()
    {
        Assert.That(Client.Ok(VfioUserCommand.DeviceGetRegionIoFds, Bytes(16, 0, 0, 0)), Is.EqualTo(Bytes(16, 0, 0, 0)));
        Client.Invalid(VfioUserCommand.DeviceGetRegionIoFds, 16, 1, 0, 0);
        Client.Invalid(VfioUserCommand.DeviceGetRegionIoFds, 16, 0, 0, 1);
        Client.Invalid(VfioUserCommand.DeviceGetRegionIoFds, 15, 0, 0, 0);
        Client.Invalid(VfioUserCommand.DeviceGetRegionIoFds, 0x100001, 0, 0, 0);
        Client.Invalid(VfioUserCommand.DeviceGetRegionIoFds, 16, 0, 3, 0);
        Client.Invalid(VfioUserCommand.DeviceGetRegionIoFds, 16, 0, 99, 0);
    }

    [Test]
    public void IrqInfoTellsTheVectors()
    {
        // INTx is maskable and masks itself, as the kernel's.
        foreach ((uint index, uint flags, uint count) in (ReadOnlySpan<(uint, uint, uint)>)[(0, 7, 1), (1, 1, 4), (2, 1, 20), (3, 1, 1), (4, 1, 1)])
            Assert.That(Client.Ok(VfioUserCommand.DeviceGetIrqInfo, Bytes(16, 0, index, 0)), Is.EqualTo(Bytes(16, flags, index, count)));
        Client.Invalid(VfioUserCommand.DeviceGetIrqInfo, 16, 0, 5, 0);
        Client.Invalid(VfioUserCommand.DeviceGetIrqInfo, 15, 0, 0, 0);
        Client.Invalid(VfioUserCommand.DeviceGetIrqInfo, 16, 0, 0);
    }

    [Test]
    public void S14_BadInterruptRequestsAreInvalidAndTheirDescriptorsClosed()
    {
        void Bad(uint argsz, uint flags, uint index, uint start, uint count, int fds = 0, byte[]? bools = null)
        {
            OwnedFd[] some = [.. Enumerable.Range(0, fds).Select(static _ => Posix.EventFd())];
            Client.Fails(Errno.EINVAL, VfioUserCommand.DeviceSetIrqs, Bytes(argsz, flags, index, start, count, bools ?? []), some);
            foreach (OwnedFd fd in some) fd.Dispose();
        }
        Client.Invalid(VfioUserCommand.DeviceSetIrqs, 20, 0x24, 0, 0);
        Bad(19, 0x24, Msix, 0, 1);
        Bad(20, 0x24, 5, 0, 1);
        foreach (uint flags in (uint[])[0, 0x20, 0x04, 0x27, 0x25, 0x26, 0x38, 0x3c, 0x64, 0x124]) Bad(20, flags, Msix, 0, 1);
        Bad(20, 0x24, Msix, 20, 1);
        Bad(20, 0x24, Msix, 19, 2);
        Bad(20, 0x24, Msix, 1, uint.MaxValue);
        Bad(20, 0x24, Msix, uint.MaxValue, 2);
        Bad(22, 0x22, Msix, 0, 2, bools: [1]);
        Bad(22, 0x22, Msix, 0, 2, bools: [1, 1, 1]);
        Bad(20, 0x21, Msix, 0, 1, fds: 1);
        Bad(20, 0x24, Msix, 0, 2, fds: 1);
        Bad(20, 0x24, Msix, 0, 2, fds: 3);
        Bad(20, 0x09, Err, 0, 1);
        Bad(20, 0x11, 4, 0, 1);
        Bad(20, 0x24, Err, 0, 2);
        Bad(20, 0x24, Msix, 0, 0);
        Bad(20, 0x21, Msix, 1, 0);
        Bad(20, 0x22, Msix, 0, 0);
        Bad(20, 0x11, Msix, 0, 0);
        Assert.That(Fake.Host.Irqs.BoundCount, Is.Zero);
    }

    [Test]
    public void S14_APendingVectorIsSignalledWhenItIsBoundAndRebindingClosesTheOldOne()
    {
        using OwnedFd first = Posix.EventFd(), second = Posix.EventFd();
        Fake.Host.Irqs.Raise(Msix, 5);
        Assert.That(Fake.Host.Irqs.IsPending(Msix, 5));
        Client.SetIrqs(0x24, Msix, 5, 1, first);
        Assert.That((IsSignalled(first), Fake.Host.Irqs.IsPending(Msix, 5)), Is.EqualTo((true, false)));
        Client.SetIrqs(0x24, Msix, 5, 1, second);
        Fake.Host.Irqs.Raise(Msix, 5);
        Assert.That((IsSignalled(first), IsSignalled(second)), Is.EqualTo((false, true)));
        Assert.That(Fake.Host.Irqs.BoundCount, Is.EqualTo(1));
    }

    [Test]
    public void InterruptsAreBoundInChunksUnboundSinglyAndDisabledTogether()
    {
        OwnedFd[] fds = [.. Enumerable.Range(0, 20).Select(static _ => Posix.EventFd())];
        // QEMU first sends vector 0 without a descriptor, then as many descriptors in each message as the server accepts.
        Client.SetIrqs(0x24, Msix, 0, 1);
        for (uint at = 0; at < 20; at += 8) Client.SetIrqs(0x24, Msix, at, Math.Min(8, 20 - at), fds[(int)at..(int)Math.Min(20, at + 8)]);
        for (uint v = 0; v < 20; v++) Fake.Host.Irqs.Raise(Msix, v);
        Assert.That(fds.Select(IsSignalled), Is.All.True);
        Client.SetIrqs(0x24, Msix, 3, 2);
        Assert.That(Fake.Host.Irqs.BoundCount, Is.EqualTo(18));
        Client.SetIrqs(0x21, Msix, 0, 0);
        Assert.That(Fake.Host.Irqs.BoundCount, Is.Zero);
        foreach (OwnedFd fd in fds) fd.Dispose();
    }

    [Test]
    public void AClientMayAskForAnInterrupt()
    {
        using OwnedFd a = Posix.EventFd(), b = Posix.EventFd();
        Client.SetIrqs(0x24, Msi, 0, 2, a, b);
        Client.SetIrqs(0x21, Msi, 0, 2);
        Assert.That((IsSignalled(a), IsSignalled(b)), Is.EqualTo((true, true)));
        Client.Ok(VfioUserCommand.DeviceSetIrqs, Bytes(22, 0x22, Msi, 0, 2, (byte)0, (byte)1));
        Assert.That((IsSignalled(a), IsSignalled(b)), Is.EqualTo((false, true)));
    }

    [Test]
    public void AMaskedVectorWaitsUntilItIsUnmasked()
    {
        using OwnedFd fd = Posix.EventFd();
        Client.SetIrqs(0x24, Msix, 1, 1, fd);
        Client.SetIrqs(0x09, Msix, 1, 1);
        Fake.Host.Irqs.Raise(Msix, 1);
        Assert.That((IsSignalled(fd), Fake.Host.Irqs.IsPending(Msix, 1)), Is.EqualTo((false, true)));
        Client.SetIrqs(0x11, Msix, 1, 1);
        Assert.That((IsSignalled(fd), Fake.Host.Irqs.IsPending(Msix, 1)), Is.EqualTo((true, false)));
    }

    [Test]
    public void S27_UnmaskSignalsALineThatIsStillAsserted()
    {
        using OwnedFd fd = Posix.EventFd();
        Client.SetIrqs(0x24, Intx, 0, 1, fd);
        Fake.Host.Irqs.SetIntx(true);
        Assert.That(IsSignalled(fd));
        Fake.Host.Irqs.SetIntx(true);
        Assert.That(IsSignalled(fd), Is.False, "the server signals once until the client unmasks");
        Client.SetIrqs(0x11, Intx, 0, 1);
        Assert.That(IsSignalled(fd), "the unmask signals the level that is still asserted");
        Fake.Host.Irqs.SetIntx(false);
        Client.SetIrqs(0x11, Intx, 0, 1);
        Assert.That(IsSignalled(fd), Is.False);
    }

    [Test]
    public void S28_DeviceFailuresNeverFireErr()
    {
        using OwnedFd err = Posix.EventFd();
        Client.SetIrqs(0x24, Err, 0, 1, err);
        Fake.OnTransition = static (_, _) => Errno.EIO;
        Client.Fails(Errno.EIO, VfioUserCommand.DeviceFeature, StateRequest(VfioDeviceState.Stop));
        Assert.That(IsSignalled(err), Is.False);
    }

    private static MappedRegion MapAll(OwnedFd fd) => MappedRegion.Map(fd, 0x4000, true, 0, "test");
}
