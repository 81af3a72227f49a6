using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.RawVfioUserClient;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>Region 9, the migration protocol from before 2023, uses the same sessions (vfio-user 9).</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
internal sealed class LegacyMigrationTests : FakeServerFixture
{
    private const uint Region = 9;
    private const ulong StateAt = 0, PendingAt = 8, OffsetAt = 16, SizeAt = 24, Page = 4096;

    public LegacyMigrationTests() : base(new VfioUserServerOptions { LegacyMigrationRegion = true }) =>
        Fake.State = [.. Enumerable.Range(0, 150_000).Select(static i => (byte)(i * 3))];

    private void Set(uint state) => Client.RegionWrite(Region, StateAt, state);

    private bool TrySet(uint state)
    {
        using VfioUserReply reply = Client.Ask(VfioUserCommand.RegionWrite, Bytes(StateAt, Region, 4, state));
        return reply.Header.Errno == Errno.None;
    }

    private uint State => Client.Read32(Region, StateAt);

    private void InvalidRead(ulong offset, int count) => Client.Invalid(VfioUserCommand.RegionRead, offset, Region, count);

    private void InvalidWrite(ulong offset, params object[] data) => Client.Invalid(VfioUserCommand.RegionWrite, offset, Region, Bytes(data).Length, Bytes(data));

    private byte[] Iterate()
    {
        ulong offset = Client.Read64(Region, OffsetAt);
        return Client.RegionRead(Region, offset, (int)Client.Read64(Region, SizeAt));
    }

    private byte[] Drain()
    {
        var all = new List<byte>();
        while (Client.Read64(Region, PendingAt) != 0) all.AddRange(Iterate());
        return [.. all];
    }

    [Test]
    public void S43_TheRegionIsToldByItsTypeAndIsThereOnlyWhenAskedFor()
    {
        Assert.That(Client.Ok(VfioUserCommand.DeviceGetInfo, Bytes(16, 0, 0, 0)), Is.EqualTo(Bytes(16, 3, 10, 5)));
        Assert.That(Client.Ok(VfioUserCommand.DeviceGetRegionInfo, Bytes(32, 0, Region, 0, 0UL, 0UL)), Is.EqualTo(Bytes(48, 3, Region, 0, 0x11000UL, 0UL)));
        Assert.That(Client.Ok(VfioUserCommand.DeviceGetRegionInfo, Bytes(48, 0, Region, 0, 0UL, 0UL)),
            Is.EqualTo(Bytes(48, 11, Region, 32, 0x11000UL, 0UL, 0x10002, 0, 3, 1)));
        using var without = new ServedDevice(new FakeVfioUserBackend());
        using RawVfioUserClient client = without.Attach();
        client.Invalid(VfioUserCommand.RegionRead, StateAt, Region, 4);
        client.Invalid(VfioUserCommand.DirtyPages, 8, 1);
    }

    [Test]
    public void S42_TransitionsFollowTheTable([Range(0, 4)] int from, [Range(0, 7)] int to)
    {
        (int, int)[] allowed = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2), (3, 3), (4, 1), (4, 4)];
        if (from != 1) Set((uint)from);
        Assert.That(TrySet((uint)to), Is.EqualTo(allowed.Contains((from, to))));
        Assert.That(State, Is.EqualTo(allowed.Contains((from, to)) ? to : from));
    }

    [Test]
    public void AWholeSaveAndLoad()
    {
        Set(3);
        Assert.That(Client.Read64(Region, PendingAt), Is.EqualTo(65536));
        byte[] first = Iterate();
        Set(2);
        byte[] rest = Drain();
        Set(0);
        byte[] all = [.. first, .. rest];
        Assert.That(all, Is.EqualTo(Fake.State));
        Set(1);
        Set(4);
        for (int at = 0; at < all.Length; at += 30_000)
        {
            byte[] part = all[at..Math.Min(all.Length, at + 30_000)];
            ulong offset = Client.Read64(Region, OffsetAt);
            Client.RegionWrite(Region, offset, part[..100]);
            Client.RegionWrite(Region, offset + 100, part[100..]);
            Client.RegionWrite(Region, SizeAt, (ulong)part.Length);
        }
        Set(1);
        Assert.That(Fake.Loaded, Is.EqualTo(all));
        Assert.That(Client.State, Is.EqualTo(VfioDeviceState.Running), "both protocols share one state");
    }

    [Test]
    public void S46_AChunkStaysUntilPendingIsReadAgain()
    {
        Set(2);
        Client.Read64(Region, PendingAt);
        Client.Read64(Region, OffsetAt);
        for (int i = 0; i < 3; i++)
        {
            Assert.That(Client.RegionRead(Region, 0x1000 + 500, 1000), Is.EqualTo(Fake.State[500..1500]));
            Assert.That(Client.RegionRead(Region, 0x1000, 65536), Is.EqualTo(Fake.State[..65536]));
        }
        Client.Read64(Region, PendingAt);
        Client.Read64(Region, OffsetAt);
        Assert.That(Client.RegionRead(Region, 0x1000, 8), Is.EqualTo(Fake.State[65536..65544]));
    }

    [Test]
    public void S47_RepeatedRegisterReadsHaveNoEffect()
    {
        Set(2);
        for (int i = 0; i < 3; i++) Assert.That(Client.Read64(Region, PendingAt), Is.EqualTo(65536));
        for (int i = 0; i < 3; i++) Assert.That((Client.Read64(Region, OffsetAt), Client.Read64(Region, SizeAt)), Is.EqualTo((0x1000UL, 65536UL)));
        Assert.That(Drain().Length + 65536, Is.EqualTo(Fake.State.Length));
    }

    [Test]
    public void S48_PendingIsZeroOnlyAtTheEndAndInPrecopyItIsLookedAtAgain()
    {
        byte[] whole = Fake.State;
        Fake.State = whole[..1000];
        Set(3);
        Assert.That(Drain(), Has.Length.EqualTo(1000));
        Assert.That(Client.Read64(Region, PendingAt), Is.Zero);
        Fake.State = whole[..1500];
        Assert.That(Drain(), Is.EqualTo(whole[1000..1500]));
        Set(2);
        Assert.That(Client.Read64(Region, PendingAt), Is.Zero);
    }

    [Test]
    public void S46_AChunkThatWasToldOfButNotFetchedIsNotLostAtTheStop()
    {
        Set(3);
        Client.Read64(Region, PendingAt);
        byte[] first = Iterate();
        Client.Read64(Region, PendingAt);
        Set(2);
        Assert.That((byte[])[.. first, .. Drain()], Is.EqualTo(Fake.State));
    }

    [Test]
    public void AccessesOutOfSequenceOrOfAnotherWidthAreInvalid()
    {
        InvalidRead(StateAt, 8);
        InvalidRead(PendingAt, 4);
        InvalidRead(4, 4);
        InvalidRead(0x800, 8);
        InvalidRead(OffsetAt, 8);
        InvalidRead(0x1000, 4);
        InvalidWrite(PendingAt, 1UL);
        InvalidWrite(StateAt, 1UL);
        InvalidWrite(0x1000, 1);
        InvalidWrite(SizeAt, 1UL);
        Set(2);
        InvalidRead(OffsetAt, 8);
        InvalidRead(SizeAt, 8);
        InvalidRead(0x1000, 4);
        Assert.That(Client.Read64(Region, PendingAt), Is.Not.Zero);
        InvalidRead(SizeAt, 8);
        Set(1);
        Set(4);
        InvalidWrite(SizeAt, 1UL);
        Client.RegionWrite(Region, 0x1000, 1);
        InvalidWrite(SizeAt, 5UL);
        InvalidWrite(SizeAt, ulong.MaxValue);
        Client.RegionWrite(Region, SizeAt, 4UL);
    }

    [Test]
    public void S50_CancelAndRetryThreeTimesOverTheOldProtocol()
    {
        for (int i = 0; i < 3; i++)
        {
            Set(3);
            Client.Read64(Region, PendingAt);
            Iterate();
            if (i == 1) Set(2);
            Set(1);
        }
        Set(2);
        Assert.That(Drain(), Is.EqualTo(Fake.State));
    }

    [Test]
    public void AFailedStateWriteLeavesTheOldState()
    {
        Fake.OnTransition = static (_, to) => to == VfioDeviceState.PreCopy ? Errno.EBUSY : Errno.None;
        Client.Fails(Errno.EBUSY, VfioUserCommand.RegionWrite, Bytes(StateAt, Region, 4, 3));
        Assert.That(State, Is.EqualTo(1));
    }

    [Test]
    public void ADeviceWithoutPrecopyHasAnEmptyOne()
    {
        Fake.MigrationFlags = VfioMigrationFlags.StopCopy;
        Set(3);
        Assert.That((State, Client.Read64(Region, PendingAt)), Is.EqualTo((3u, 0UL)));
        Set(2);
        Assert.That(Drain(), Is.EqualTo(Fake.State));
    }

    [Test]
    public void DirtyPagesOfTheOldProtocolComeFromTheSameLog()
    {
        using var ram = new VfioUserMemory("guest", 16 * Page);
        Client.Map(0x10000, 16 * Page, ram.Fd);
        Assert.That(Client.Ok(VfioUserCommand.DirtyPages, Bytes(8, 1)), Is.Empty);
        Fake.Host.Dma.Write(0x12000, new byte[8]);
        byte[] get = Bytes(48, 4, 0x10000UL, 16 * Page, Page, 8UL);
        Assert.That(Client.Ok(VfioUserCommand.DirtyPages, Bytes(40, 4, 0x10000UL, 16 * Page, Page, 8UL)), Is.EqualTo(Bytes(48, 4)), "a reply to a request that is too small names the size that it needs");
        Assert.That(Client.Ok(VfioUserCommand.DirtyPages, get), Is.EqualTo(Bytes(get, 4UL)));
        Assert.That(Client.Ok(VfioUserCommand.DirtyPages, get), Is.EqualTo(Bytes(get, 0UL)));
        Client.Invalid(VfioUserCommand.DirtyPages, 48, 4, 0x10000UL, 16 * Page, Page, 16UL);
        Client.Invalid(VfioUserCommand.DirtyPages, 48, 4, 0x10000UL, 16 * Page);
        Client.Invalid(VfioUserCommand.DirtyPages, 8, 3);
        Assert.That(Client.Ok(VfioUserCommand.DirtyPages, Bytes(8, 2)), Is.Empty);
        Client.Fails(Errno.EINVAL, VfioUserCommand.DirtyPages, get);
    }
}
