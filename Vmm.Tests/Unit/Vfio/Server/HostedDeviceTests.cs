using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Workloads;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Hosted;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tools.Devices;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>The server hosts any PCI function of the core: the bridge carries registers, interrupts and state (vfio-user 13).</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
internal sealed class HostedDeviceTests
{
    private static ServedDevice Serve(RolePciDevice.Behaviour behaviour, VfioUserServerOptions? options = null, string typeName = "role", ulong limitBytes = 64UL << 20) => new(
        new PciDeviceBackend(typeName, b => b.Services.AddSingleton<IDeviceFactory>(new RolePciDevice.Factory(behaviour)), static () => new DeviceOptions("role")) { LimitBytes = limitBytes },
        options);

    private static ServedDevice ServeEdu() => new(new PciDeviceType<EduPlugin>(new EduDeviceFactory()).Create(DeviceOptions.Parse("edu")));

    private static byte[] Save(RawVfioUserClient client, int piece = 4096)
    {
        client.SetState(VfioDeviceState.StopCopy);
        byte[] state = client.MigReadAll(piece);
        client.SetState(VfioDeviceState.Stop);
        return state;
    }

    private static void Load(RawVfioUserClient client, ReadOnlySpan<byte> state, int piece)
    {
        client.SetState(VfioDeviceState.Resuming);
        for (; state.Length > 0; state = state[Math.Min(piece, state.Length)..]) client.MigWrite(state[..Math.Min(piece, state.Length)]);
    }

    [Test]
    public void AnOrdinaryFunctionIsServedWithItsRegistersConfigurationAndInterrupts()
    {
        using ServedDevice served = ServeEdu();
        using RawVfioUserClient client = served.Attach();
        Assert.That(client.Read32(7, 0), Is.EqualTo(0x11e81234));
        client.RegionWrite(7, 0x10, uint.MaxValue);
        Assert.That(client.Read32(7, 0x10), Is.EqualTo(0xfff00000));
        Assert.That((client.Read32(0, 0), client.RegionRead(7, 0, 256)[0x34]), Is.EqualTo((EduDevice.Identification, (byte)0x40)));
        client.RegionWrite(0, 4, 0x12345678);
        Assert.That(client.Read32(0, 4), Is.EqualTo(~0x12345678u));
        client.RegionWrite(0, 8, 10);
        LeakCheck.WaitFor(() => (client.Read32(0, 0x20) & 1) == 0, "the factorial is not computed");
        Assert.That(client.Read32(0, 8), Is.EqualTo(3628800u));

        using OwnedFd line = Posix.EventFd(), msi = Posix.EventFd();
        client.SetIrqs(0x24, 0, 0, 1, line);
        client.RegionWrite(0, 0x60, 0x10);
        RawVfioUserClient.WaitSignalled(line);
        client.SetIrqs(0x11, 0, 0, 1);
        RawVfioUserClient.WaitSignalled(line);
        client.RegionWrite(0, 0x64, 0x10);
        client.SetIrqs(0x11, 0, 0, 1);
        Assert.That(RawVfioUserClient.IsSignalled(line), Is.False, "the server does not signal an acknowledged interrupt again (vfio-user S-27)");
        client.RegionWrite(7, 4, (ushort)6);
        client.RegionWrite(7, 0x42, (ushort)1);
        client.SetIrqs(0x24, 1, 0, 1, msi);
        client.RegionWrite(0, 0x60, 0x20);
        RawVfioUserClient.WaitSignalled(msi);
        client.Ok(VfioUserCommand.DeviceReset, []);
        Assert.That((client.Read32(0, 4), client.Read32(0, 0x24), client.Read32(7, 4) & 0xffff), Is.EqualTo((0u, 0u, 0u)));
    }

    [Test]
    public void VectorsWithoutAnEventFdShowInThePendingBitsAndAreSentWhenOneIsBound()
    {
        var behaviour = new RolePciDevice.Behaviour();
        using ServedDevice served = Serve(behaviour);
        using RawVfioUserClient client = served.Attach();
        client.RegionWrite(7, 4, (ushort)6);
        client.RegionWrite(7, 0x42, (ushort)0x8000);
        behaviour.Made[0].Raise(1);
        behaviour.Made[0].Raise(9);
        Assert.That((client.Read64(0, 0x1800), client.RegionRead(0, 0x1801, 1)[0]), Is.EqualTo((0x202UL, (byte)2)));
        using OwnedFd vector = Posix.EventFd();
        client.SetIrqs(0x24, 2, 9, 1, vector);
        RawVfioUserClient.WaitSignalled(vector);
        Assert.That(client.Read64(0, 0x1800), Is.EqualTo(2UL));
    }

    [Test]
    public void StateMovesInPiecesOfAnySizeAndTheTargetGoesOn([Values(1, 100, 65536)] int piece, [Values] bool withPreCopy)
    {
        var behaviour = new RolePciDevice.Behaviour { BulkBytes = piece == 1 ? 2000 : 200_000 };
        using ServedDevice source = Serve(behaviour), target = Serve(behaviour);
        using RawVfioUserClient from = source.Attach(), to = target.Attach();
        from.RegionWrite(0, 0, 0xcafe);
        from.RegionWrite(0, 0x1000, 0xfee00000UL);
        from.RegionWrite(7, 4, (ushort)6);
        byte[] before = [];
        if (withPreCopy)
        {
            from.SetState(VfioDeviceState.PreCopy);
            before = from.MigReadAll(4096);
        }
        Load(to, [.. before, .. Save(from)], piece);
        to.SetState(VfioDeviceState.Running);
        Assert.That((to.Read32(0, 0), to.Read64(0, 0x1000), to.Read32(7, 4) & 0xffff), Is.EqualTo((0xcafe, 0xfee00000UL, 6u)));
        Assert.That((behaviour.Made[^1].Loaded, behaviour.Made[^1].Owns, behaviour.Made[0].Owns), Is.EqualTo((behaviour.BulkBytes, true, false)));
        Assert.That(target.Device.Dma.IsBusMaster);
    }

    [Test]
    public void S44_TheStateIsPulledAsItIsWrittenAndNeverHeldWhole()
    {
        var behaviour = new RolePciDevice.Behaviour { BulkBytes = 30_000_000 };
        using ServedDevice served = Serve(behaviour);
        using RawVfioUserClient client = served.Attach();
        client.SetState(VfioDeviceState.StopCopy);
        Assert.That(client.MigRead(65536), Has.Length.EqualTo(65536));
        Assert.That(Interlocked.Read(ref behaviour.Written), Is.LessThan(4 << 20), "the save code must not run ahead of the reader");
        Assert.That(client.MigReadAll(1 << 20).Length, Is.GreaterThan(29_000_000));
    }

    [Test]
    public void S35_RegistersAreReadInTheMiddleOfASave()
    {
        var behaviour = new RolePciDevice.Behaviour { BulkBytes = 30_000_000 };
        using ServedDevice served = Serve(behaviour);
        using RawVfioUserClient client = served.Attach();
        client.RegionWrite(0, 0, 77);
        client.SetState(VfioDeviceState.StopCopy);
        client.MigRead(65536);
        client.RegionWrite(0, 0, 78);
        Assert.That(client.Read32(0, 0), Is.EqualTo(77));
        client.SetState(VfioDeviceState.Running);
        client.RegionWrite(0, 0, 79);
        Assert.That(client.Read32(0, 0), Is.EqualTo(79));
    }

    [Test]
    public void S52_OwnershipIsGivenUpWithTheStopTakenAtTheStartAndAFailureToTakeItFailsTheStart()
    {
        var behaviour = new RolePciDevice.Behaviour();
        using ServedDevice served = Serve(behaviour);
        using RawVfioUserClient client = served.Attach();
        RolePciDevice device = behaviour.Made[0];
        Save(client);
        Assert.That(device.Owns, Is.False);
        behaviour.FailAcquire = true;
        client.Fails(new DeviceStateException("").Errno, VfioUserCommand.DeviceFeature, RawVfioUserClient.StateRequest(VfioDeviceState.Running));
        Assert.That((client.State, device.Owns), Is.EqualTo((VfioDeviceState.Stop, false)));
        behaviour.FailAcquire = false;
        client.SetState(VfioDeviceState.Running);
        Assert.That(device.Owns);
        client.SetState(VfioDeviceState.StopCopy);
        client.SetState(VfioDeviceState.Running);
        Assert.That(behaviour.Log, Is.EqualTo((string[])
            [
                "acquire", "drain and flush", "PrecopySetup", "PrecopyDone",
                "drain and flush", // The server undoes the failed start.
                "acquire", "drain and flush", "PrecopySetup", "PrecopyDone", "acquire",
            ]));
    }

    [Test]
    public void S53_NothingOfALoadShowsBeforeItIsCompleteAndNothingIsLeftToDoWhenItRuns()
    {
        var behaviour = new RolePciDevice.Behaviour();
        using ServedDevice source = Serve(behaviour), target = Serve(behaviour);
        using RawVfioUserClient from = source.Attach(), to = target.Attach();
        from.RegionWrite(0, 0, 1);
        to.RegionWrite(0, 0, 2);
        Load(to, Save(from), 100);
        Assert.That(to.Read32(0, 0), Is.EqualTo(2));
        to.SetState(VfioDeviceState.Stop);
        Assert.That(to.Read32(0, 0), Is.EqualTo(1));
    }

    [Test]
    public void S55_EveryPrefixAndEveryChangedByteIsRefusedAndTheDeviceWorksAgainAfterAReset()
    {
        var behaviour = new RolePciDevice.Behaviour { BulkBytes = 100 };
        using ServedDevice source = Serve(behaviour), target = Serve(behaviour);
        using RawVfioUserClient from = source.Attach(), to = target.Attach();
        byte[] state = Save(from);
        var random = new Random(55);
        for (int i = 0; i < 60; i++)
        {
            byte[] bad = [.. state];
            if (i % 2 == 0) bad = bad[..random.Next(state.Length)];
            else bad[random.Next(state.Length)] ^= (byte)(1 << random.Next(8));
            to.SetState(VfioDeviceState.Resuming);
            using VfioUserReply write = to.Ask(VfioUserCommand.MigDataWrite, RawVfioUserClient.Bytes(8 + bad.Length, bad.Length, bad));
            using VfioUserReply end = to.Ask(VfioUserCommand.DeviceFeature, RawVfioUserClient.StateRequest(VfioDeviceState.Stop));
            Assert.That((int)end.Header.Errno, Is.Not.Zero, $"case {i}");
            Assert.That(to.State, Is.EqualTo(VfioDeviceState.Resuming));
            to.Ok(VfioUserCommand.DeviceReset, []);
        }
        Load(to, state, 1000);
        to.SetState(VfioDeviceState.Running);
    }

    [Test]
    public void S41_AnotherTypesStateIsRefusedAtTheFirstWriteAndS56_TooMuchIsEfbig()
    {
        var behaviour = new RolePciDevice.Behaviour { BulkBytes = 100_000 };
        using ServedDevice source = Serve(behaviour), other = Serve(behaviour, typeName: "elor"), small = Serve(behaviour, limitBytes: 50_000);
        using RawVfioUserClient from = source.Attach(), toOther = other.Attach(), toSmall = small.Attach();
        byte[] state = Save(from);
        byte[] write = RawVfioUserClient.Bytes(8 + 4096, 4096, state[..4096]);
        toOther.SetState(VfioDeviceState.Resuming);
        toOther.Fails(Errno.EINVAL, VfioUserCommand.MigDataWrite, write);
        toSmall.SetState(VfioDeviceState.Resuming);
        toSmall.Fails(Errno.EFBIG, VfioUserCommand.MigDataWrite, write);
        toSmall.Ok(VfioUserCommand.DeviceReset, []);
        toSmall.SetState(VfioDeviceState.StopCopy);
        Errno errno = Errno.None;
        for (int i = 0; i < 100 && errno == Errno.None; i++)
        {
            using VfioUserReply reply = toSmall.Ask(VfioUserCommand.MigDataRead, RawVfioUserClient.Bytes(8 + 4096, 4096));
            errno = reply.Header.Errno;
        }
        Assert.That(errno, Is.EqualTo(Errno.E2BIG));
    }

    [Test]
    public void S54_ADeviceThatFailsToSaveFailsTheReadsForGoodAndTheNextAttemptIsClean()
    {
        var behaviour = new RolePciDevice.Behaviour { BulkBytes = 2_000_000, FailSave = true };
        using ServedDevice served = Serve(behaviour);
        using RawVfioUserClient client = served.Attach();
        client.SetState(VfioDeviceState.StopCopy);
        Errno errno = Errno.None;
        for (int i = 0; i < 1000 && errno == Errno.None; i++)
        {
            using VfioUserReply reply = client.Ask(VfioUserCommand.MigDataRead, RawVfioUserClient.Bytes(8 + 65536, 65536));
            errno = reply.Header.Errno;
        }
        Assert.That(errno, Is.EqualTo(new DeviceStateException("").Errno));
        client.Fails(errno, VfioUserCommand.MigDataRead, RawVfioUserClient.Bytes(8 + 65536, 65536));
        behaviour.FailSave = false;
        client.SetState(VfioDeviceState.Running);
        Assert.That(Save(client, 65536).Length, Is.GreaterThan(2_000_000));
    }

    [Test]
    public void S49_S50_ThreeCancelsInTheMiddleLeaveNothingBehind()
    {
        var behaviour = new RolePciDevice.Behaviour { BulkBytes = 3_000_000 };
        using ServedDevice served = Serve(behaviour), target = Serve(behaviour);
        using RawVfioUserClient client = served.Attach(), to = target.Attach();
        for (int i = 0; i < 3; i++)
        {
            if (i == 1) client.SetState(VfioDeviceState.PreCopy);
            client.SetState(VfioDeviceState.StopCopy);
            client.MigRead(4096);
            client.SetState(VfioDeviceState.Running);
            Assert.That(served.Device.Fsm.HasSession, Is.False);
            to.SetState(VfioDeviceState.Resuming);
            to.Ask(VfioUserCommand.MigDataWrite, RawVfioUserClient.Bytes(8 + 8, 8, new byte[8])).Dispose();
            to.Ok(VfioUserCommand.DeviceReset, []);
        }
        Load(to, Save(client, 65536), 65536);
        to.SetState(VfioDeviceState.Running);
        Assert.That(behaviour.Made[^1].Loaded, Is.EqualTo(3_000_000));
    }

    [Test]
    public void S58_EachDeviceRunsByItself()
    {
        using ServedDevice stopped = ServeEdu(), running = ServeEdu();
        using RawVfioUserClient one = stopped.Attach(), two = running.Attach();
        one.SetState(VfioDeviceState.Stop);
        one.RegionWrite(0, 8, 5);
        two.RegionWrite(0, 8, 5);
        LeakCheck.WaitFor(() => two.Read32(0, 8) == 120, "the other device was stopped too");
        Assert.That((one.Read32(0, 8), one.Read32(0, 0x20) & 1), Is.EqualTo((5u, 1u)));
        one.SetState(VfioDeviceState.Running);
        LeakCheck.WaitFor(() => one.Read32(0, 8) == 120, "the device did not continue");
    }

    [Test]
    public void ADeviceThatIsNoneOrRefusesItsOptionsIsRefused()
    {
        Assert.That(() => new PciDeviceBackend("scratch", static b => b.AddPlugin<WorkloadPlugin>(), static () => new DeviceOptions("scratch")), Throws.InstanceOf<ConfigurationException>());
        Assert.That(() => new PciDeviceType<EduPlugin>(new EduDeviceFactory()).Create(DeviceOptions.Parse("edu,colour=red")), Throws.InstanceOf<ConfigurationException>());
    }
}
