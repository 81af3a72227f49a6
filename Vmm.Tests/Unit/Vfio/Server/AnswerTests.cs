using System.Buffers.Binary;
using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Pci;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.RawVfioUserClient;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>The server answers the client of a hanging device, and carries out function-level resets (vfio-user 6 and 7).</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
internal sealed class AnswerTests() : FakeServerFixture(new VfioUserServerOptions { QuiesceTimeout = s_limit })
{
    private static readonly TimeSpan s_limit = TimeSpan.FromMilliseconds(300);

    private void AnswersInTime(Errno expected, VfioUserCommand command, params object[] fields)
    {
        var clock = Stopwatch.StartNew();
        using VfioUserReply reply = Client.Ask(command, Bytes(fields));
        Assert.That(reply.Header.Errno, Is.EqualTo(expected), command.ToString());
        Assert.That(clock.Elapsed, Is.LessThan(TimeSpan.FromSeconds(3)), command.ToString());
    }

    [Test]
    public void S31_AStateChangeThatHangsIsAnsweredAndTheOnesBehindItToo()
    {
        var hang = new TaskCompletionSource();
        Fake.Hang = hang.Task;
        AnswersInTime(Errno.EIO, VfioUserCommand.DeviceFeature, StateRequest(VfioDeviceState.StopCopy));
        AnswersInTime(Errno.EIO, VfioUserCommand.DeviceFeature, StateRequest(VfioDeviceState.Running));
        AnswersInTime(Errno.EIO, VfioUserCommand.DeviceReset);
        AnswersInTime(Errno.EIO, VfioUserCommand.MigDataRead, 1032, 1024);
        Assert.That(Client.Read32(0, 0), Is.Zero, "the hanging state change does not block register accesses");
        Assert.That(Client.State, Is.EqualTo(VfioDeviceState.Running), "the server reports the last completed state");
        hang.SetResult();
        LeakCheck.WaitFor(() => Client.State == VfioDeviceState.Stop, "the late state change did not end");
        Client.SetState(VfioDeviceState.StopCopy);
        Assert.That(Client.MigReadAll(), Is.EqualTo(Fake.State));
        Client.SetState(VfioDeviceState.Running);
    }

    [Test]
    public void S31_AResetThatHangsIsAnswered()
    {
        var hang = new TaskCompletionSource();
        Fake.Hang = hang.Task;
        AnswersInTime(Errno.EIO, VfioUserCommand.DeviceReset);
        hang.SetResult();
        Client.Ok(VfioUserCommand.DeviceReset, []);
    }

    [Test]
    public void S31_S33_AClientThatLeavesAHangingDeviceIsFollowedByOneThatFindsItRunning()
    {
        var hang = new TaskCompletionSource();
        Fake.Hang = hang.Task;
        AnswersInTime(Errno.EIO, VfioUserCommand.DeviceFeature, StateRequest(VfioDeviceState.Stop));
        Client.HangUp();
        hang.SetResult();
        using RawVfioUserClient next = Served.Attach();
        Assert.That(next.State, Is.EqualTo(VfioDeviceState.Running));
    }

    [Test]
    public void S34_ADeviceThatDoesNotBecomeQuietIsAnsweredForOnceInTime()
    {
        var hang = new TaskCompletionSource<Errno>();
        Fake.OnQuiesce = () => new ValueTask<Errno>(hang.Task);
        AnswersInTime(Errno.EIO, VfioUserCommand.DmaMap, MapRequest(0, 0x1000));
        AnswersInTime(Errno.EIO, VfioUserCommand.DeviceReset);
        hang.SetResult(Errno.None);
        Fake.OnQuiesce = static () => ValueTask.FromResult(Errno.None);
        Client.Map(0, 0x1000, null);
    }

    [Test]
    public void AFunctionLevelResetResetsTheDeviceAndLeavesMapsAndEventFds([Values(1, 2, 4)] int width, [Values] bool canReset)
    {
        const int at = 0x40, control = at + 8;
        Fake.ConfigSpace[PciRegisters.Status] = (byte)PciRegisters.StatusCapabilityList;
        Fake.ConfigSpace[PciRegisters.CapabilityList] = 0x80;
        (Fake.ConfigSpace[0x80], Fake.ConfigSpace[0x81], Fake.ConfigSpace[at]) = (PciCapabilityId.PowerManagement, at, PciCapabilityId.Express);
        if (canReset) BinaryPrimitives.WriteUInt32LittleEndian(Fake.ConfigSpace.AsSpan(at + 4), 1 << 28);
        using OwnedFd line = Posix.EventFd();
        Client.Map(0, 0x1000, null);
        Client.SetIrqs(0x24, 0, 0, 1, line);
        Client.SetState(VfioDeviceState.StopCopy);
        Client.SetState(VfioDeviceState.Running);
        Fake.Log.Clear();
        object data = width switch { 1 => (byte)0x80, 2 => (ushort)0x8000, _ => 0x8000u };
        Client.RegionWrite(7, (ulong)(width == 1 ? control + 1 : control), data);
        Client.RegionWrite(7, control, (byte)0xff, (byte)0x7f);
        Client.RegionWrite(7, control + 4, uint.MaxValue);
        Assert.That(Fake.Log, Is.EqualTo(canReset ? (string[])["quiesce", "reset Device", "unquiesce"] : []));
        Assert.That((Fake.Host.Dma.RegionCount, Served.Device.Irqs.BoundCount), Is.EqualTo((1, 1)));
    }

    [Test]
    public void ACapabilityChainWithoutEndEndsTheSearch()
    {
        Fake.ConfigSpace[PciRegisters.Status] = (byte)PciRegisters.StatusCapabilityList;
        Fake.ConfigSpace[PciRegisters.CapabilityList] = 0x40;
        (Fake.ConfigSpace[0x40], Fake.ConfigSpace[0x41]) = (1, 0x40);
        Client.RegionWrite(7, 0x48, 0x8000u);
        Assert.That(Fake.Log, Does.Not.Contain("reset Device"));
    }

    [Test]
    public void S18_AFileThatItsClientTruncatesIsAnErrorWhereNothingIsMapped([Values] bool onlySealed)
    {
        using var map = new DmaMap(16, mayMap: onlySealed, onlySealed) { IsBusMaster = true };
        string path = Path.GetTempFileName();
        using OwnedFd file = Posix.Open(path, Posix.O_RDWR, 0, out _)!;
        File.Delete(path);
        Posix.Truncate(file, 0x4000);
        VfioUserDmaMap.TryRead(MapRequest(0, 0x4000), out VfioUserDmaMap request);
        Assert.That(map.Map(request, Posix.Duplicate(file)), Is.EqualTo(Errno.None));
        byte[] bytes = new byte[100];
        Assert.That(map.Read(0x1000, bytes), Is.EqualTo(Errno.None));
        Posix.Truncate(file, 0);
        Assert.That(map.Read(0x1000, bytes), Is.EqualTo(Errno.EFAULT), "an access through a mapping would end this process with SIGBUS");
    }

    [Test]
    public void S18_ASealedFileIsMappedAndCannotBeTruncated()
    {
        using var map = new DmaMap(16, mayMap: true, onlySealed: true) { IsBusMaster = true };
        using var ram = new VfioUserMemory("sealed", 0x4000);
        VfioUserDmaMap.TryRead(MapRequest(0, 0x4000), out VfioUserDmaMap request);
        Assert.That(map.Map(request, Posix.Duplicate(ram.Fd)), Is.EqualTo(Errno.None));
        Assert.That(map.Write(0, [42]), Is.EqualTo(Errno.None));
        Assert.That((ram.Slice(0, 1)[0], Posix.IsSealedAgainstShrinking(ram.Fd)), Is.EqualTo(((byte)42, true)));
        Assert.That(Posix.Truncate(ram.Fd, 0), Is.EqualTo(Errno.EPERM));
        Assert.That(map.Read(0, new byte[1]), Is.EqualTo(Errno.None));
    }
}
