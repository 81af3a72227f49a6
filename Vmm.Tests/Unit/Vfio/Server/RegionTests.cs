using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.RawVfioUserClient;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>Register accesses, including posted writes (vfio-user 3.6, 3.7, 6).</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
internal sealed class RegionTests : FakeServerFixture
{
    [Test]
    public void S16_EveryWidthAndAnyBulkWorks([Values(1, 2, 4, 8, 3, 100, 4096)] int width)
    {
        byte[] data = [.. Enumerable.Range(1, width).Select(static i => (byte)i)];
        Client.RegionWrite(0, 0, data);
        Assert.That(Client.RegionRead(0, 0, width), Is.EqualTo(data));
        Assert.That(Client.RegionRead(7, 0, 256), Has.Length.EqualTo(256));
    }

    [Test]
    public void S15_UndefinedRegistersReadAsZero() => Assert.That(Client.RegionRead(7, 0, 256), Is.All.Zero);

    [Test]
    public void AccessesOutsideARegionAreInvalid()
    {
        foreach (object[] access in (object[][])[[0x1000UL, 0u, 1], [0xfffUL, 0u, 2], [ulong.MaxValue, 0u, 1], [ulong.MaxValue, 0u, 4], [0UL, 3u, 1], [0UL, 8u, 4], [0UL, 9u, 4],
            [0UL, 0xdeadbeefu, 4], [0UL, 0u, 0x10_0001], [0UL, 0u, uint.MaxValue]])
        {
            Client.Invalid(VfioUserCommand.RegionRead, access);
            Client.Invalid(VfioUserCommand.RegionWrite, [.. access, (byte)1]);
        }
        Client.Invalid(VfioUserCommand.RegionWrite, 0UL, 0u, 4, (byte)1, (byte)2, (byte)3);
        Client.Invalid(VfioUserCommand.RegionWrite, 0UL, 0u, 4, 1, (byte)5);
        Client.Invalid(VfioUserCommand.RegionRead, 0UL, 0u);
        Assert.That(Fake.Registers, Is.All.Zero);
    }

    [Test]
    public void ACountOfZeroSucceedsEmpty()
    {
        Assert.That(Client.Ok(VfioUserCommand.RegionRead, Bytes(0UL, 0u, 0)), Is.Empty);
        Assert.That(Client.Ok(VfioUserCommand.RegionWrite, Bytes(0UL, 0u, 0)), Is.Empty);
    }

    private static byte[] Multi(params (ulong Offset, uint Region, uint Count, ulong Data)[] entries) =>
        Bytes([(ulong)entries.Length, .. entries.SelectMany(static e => (object[])[e.Offset, e.Region, e.Count, e.Data])]);

    [Test]
    public void S17_WriteMultiAppliesItsEntriesInOrder()
    {
        byte[] request = Multi((0, 0, 4, 1), (0, 0, 4, 2), (4, 0, 2, 0xffff_1234), (8, 0, 8, 0x1122334455667788));
        Assert.That(Client.Ok(VfioUserCommand.RegionWriteMulti, request), Is.EqualTo(Bytes(4UL)));
        Assert.That(Client.RegionRead(0, 0, 16), Is.EqualTo(Bytes(2, 0x1234, 0x1122334455667788UL)));
    }

    [Test]
    public void S17_WriteMultiIsCheckedWholeBeforeAnythingIsWritten()
    {
        Client.Fails(Errno.EINVAL, VfioUserCommand.RegionWriteMulti, Multi((0, 0, 4, 1), (0, 0, 9, 1)));
        Client.Fails(Errno.EINVAL, VfioUserCommand.RegionWriteMulti, Multi((0, 0, 4, 1), (0xffe, 0, 4, 1)));
        Client.Fails(Errno.EINVAL, VfioUserCommand.RegionWriteMulti, Multi((0, 0, 4, 1), (0, 5, 4, 1)));
        Client.Invalid(VfioUserCommand.RegionWriteMulti, 2UL, 0UL, 0u, 4, 1UL);
        Client.Invalid(VfioUserCommand.RegionWriteMulti, ulong.MaxValue, 0UL, 0u, 4, 1UL);
        Client.Invalid(VfioUserCommand.RegionWriteMulti, (1UL << 61) + 1, 0UL, 0u, 4, 1UL);
        Client.Invalid(VfioUserCommand.RegionWriteMulti, 1);
        Assert.That(Fake.Registers, Is.All.Zero);
    }

    [Test]
    public void S29_NoReplyCommandsAreDoneInOrderAndTheirFailuresAreSilent()
    {
        for (uint i = 0; i < 100; i++) Client.Send(VfioUserCommand.RegionWrite, Bytes(0UL, 0u, 4, i), flags: VfioUserHeader.NoReply);
        Client.Send(VfioUserCommand.RegionWrite, Bytes(0UL, 77u, 4, 1), flags: VfioUserHeader.NoReply);
        Client.Send((VfioUserCommand)99, [], flags: VfioUserHeader.NoReply);
        Client.Send(VfioUserCommand.RegionWriteMulti, Multi((4, 0, 4, 9)), flags: VfioUserHeader.NoReply);
        Assert.That((Client.Read32(0, 0), Client.Read32(0, 4)), Is.EqualTo((99u, 9u)));
        Assert.That(Client.HasNothingToRead);
        Assert.That((Served.Server.Stats.Posted, Served.Server.Stats.Refusals), Is.EqualTo((103L, 2L)));
    }

    [Test]
    public void S31_RepliesComeAtOnce()
    {
        var clock = Stopwatch.StartNew();
        for (int i = 0; i < 200; i++) Client.Read32(0, 0);
        Assert.That(clock.Elapsed, Is.LessThan(TimeSpan.FromSeconds(3)));
    }
}
