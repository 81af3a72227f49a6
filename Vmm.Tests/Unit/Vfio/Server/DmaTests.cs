using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.RawVfioUserClient;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>Access to the client's memory: maps, DMA by descriptor and by message, dirty logging (vfio-user 3.8 to 3.10, 4).</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
internal sealed class DmaTests : FakeServerFixture
{
    private const ulong Page = 4096;
    private readonly VfioUserMemory _ram = new("guest", 256 * Page);

    private DmaMap Dma => Fake.Host.Dma;

    [TearDown]
    public void FreeRam() => _ram.Dispose();

    private Errno Write(ulong address, int length, byte value = 0xab)
    {
        byte[] data = new byte[length];
        Array.Fill(data, value);
        return Dma.Write(address, data);
    }

    [Test]
    public void S20_AMapReachesTheClientsMemoryAtItsFileOffset()
    {
        Client.Map(0x10_0000, 4 * Page, _ram.Fd, fileOffset: 2 * Page);
        Assert.That(Write(0x10_0010, 0x20), Is.EqualTo(Errno.None));
        Assert.That(_ram.Slice(0x2010, 0x20).IndexOfAnyExcept((byte)0xab), Is.EqualTo(-1));
        _ram.Slice(0x3000, 4).Fill(0x77);
        byte[] back = new byte[4];
        Assert.That(Dma.Read(0x10_1000, back), Is.EqualTo(Errno.None));
        Assert.That(back, Is.All.EqualTo(0x77));
    }

    [Test]
    public void S20_NothingNeedsToBeAligned()
    {
        Client.Map(0xb0123, 0x77, _ram.Fd, fileOffset: 0x1fff);
        Assert.That((Write(0xb0123, 0x77), Write(0xb0122, 1), Write(0xb019a, 1)), Is.EqualTo((Errno.None, Errno.EFAULT, Errno.EFAULT)));
        Assert.That((_ram.Slice(0x1ffe, 1)[0], _ram.Slice(0x1fff, 1)[0], _ram.Slice(0x2075, 1)[0], _ram.Slice(0x2076, 1)[0]), Is.EqualTo(((byte)0, (byte)0xab, (byte)0xab, (byte)0)));
    }

    [Test]
    public void ATransferMayCrossAdjacentMapsAndHonoursTheirDirections()
    {
        Client.Map(0, Page, _ram.Fd);
        Client.Map(Page, Page, _ram.Fd, 8 * Page);
        Client.Map(2 * Page, Page, _ram.Fd, 2 * Page, flags: 1);
        Assert.That(Write(Page - 8, 16), Is.EqualTo(Errno.None));
        Assert.That((_ram.Slice(Page - 1, 1)[0], _ram.Slice(8 * Page, 1)[0]), Is.EqualTo(((byte)0xab, (byte)0xab)));
        Assert.That((Write(2 * Page, 1), Dma.Read(2 * Page, new byte[8]), Write(3 * Page, 1)), Is.EqualTo((Errno.EPERM, Errno.None, Errno.EFAULT)));
        Client.Map(3 * Page, Page, _ram.Fd, 3 * Page, flags: 2);
        Assert.That((Dma.Read(3 * Page, new byte[1]), Write(3 * Page, 1)), Is.EqualTo((Errno.EPERM, Errno.None)));
    }

    [Test]
    public void NoDmaWithoutBusMaster()
    {
        Client.Map(0, Page, _ram.Fd);
        Dma.IsBusMaster = false;
        Assert.That((Write(0, 1), Dma.Read(0, new byte[1])), Is.EqualTo((Errno.ENODEV, Errno.ENODEV)));
    }

    [Test]
    public void S18_BadMapsAreInvalidAndTheirDescriptorsClosed()
    {
        void Bad(ulong address, ulong size, ulong offset = 0, uint flags = 3, uint argsz = 32, params OwnedFd[] fds) =>
            Client.Fails(Errno.EINVAL, VfioUserCommand.DmaMap, Bytes(argsz, flags, offset, address, size), fds);
        Bad(0, Page, fds: [_ram.Fd, _ram.Fd]);
        Bad(0, 0, fds: _ram.Fd);
        Bad(0, 257 * Page, fds: _ram.Fd);
        Bad(0, Page, offset: 256 * Page, fds: _ram.Fd);
        Bad(0, Page, offset: ulong.MaxValue - Page + 1, fds: _ram.Fd);
        Bad(ulong.MaxValue - Page + 1, 2 * Page, fds: _ram.Fd);
        Bad(ulong.MaxValue - 10, 100);
        Bad(0, Page, flags: 19, fds: _ram.Fd);
        Bad(0, Page, flags: 7);
        Bad(0, Page, flags: 11);
        Bad(0, Page, argsz: 31);
        Client.Invalid(VfioUserCommand.DmaMap, 32, 3, 0UL, 0UL);
        Client.Fails(Errno.ENOSPC, VfioUserCommand.DmaMap, MapRequest(0, (8UL << 40) + 1));
        (OwnedFd read, OwnedFd write) = Posix.Pipe();
        using (read) using (write) Bad(0, Page, fds: write);
        Assert.That(Dma.RegionCount, Is.Zero);
    }

    [Test]
    public void OverlapsAreInvalidAndTheSameMapAgainIsNone()
    {
        Client.Map(0x10000, 4 * Page, _ram.Fd);
        Client.Map(0x10000, 4 * Page, _ram.Fd);
        using var other = new VfioUserMemory("other", 4 * Page);
        foreach ((byte[] request, OwnedFd[] fds) in (ReadOnlySpan<(byte[], OwnedFd[])>)[
            (MapRequest(0x10000, 4 * Page), [other.Fd]), (MapRequest(0x10000, 4 * Page), []), (MapRequest(0x10000, 4 * Page, Page), [_ram.Fd]),
            (MapRequest(0x10000, 4 * Page, flags: 1), [_ram.Fd]), (MapRequest(0x11000, Page), [_ram.Fd]), (MapRequest(0xf000, 2 * Page), []), (MapRequest(0x13fff, 2), [])])
            Client.Fails(Errno.EINVAL, VfioUserCommand.DmaMap, request, fds);
        Client.Map(0x14000, Page, null);
        Client.Map(0xf000, Page, null);
        Assert.That(Dma.RegionCount, Is.EqualTo(3));
    }

    [Test]
    public void S18_WithoutMappingAccessesGoByPreadAndATruncatedFileIsAnErrorNotASignal()
    {
        string path = Path.GetTempFileName();
        using OwnedFd file = Posix.Open(path, Posix.O_RDWR, 0, out _)!;
        File.Delete(path);
        Posix.Truncate(file, 4 * 4096);
        Client.Map(0, 4 * Page, file, flags: 3 | 8);
        Assert.That(Write(Page, 100), Is.EqualTo(Errno.None));
        byte[] back = new byte[100];
        Assert.That((Dma.Read(Page, back), back[99]), Is.EqualTo((Errno.None, (byte)0xab)));
        Posix.Truncate(file, 0);
        Assert.That(Dma.Read(Page, back), Is.EqualTo(Errno.EFAULT));
    }

    [Test]
    public void S21_UnmapWantsExactlyOneMapAndEchoesTheRequest()
    {
        Client.Map(0x10000, 4 * Page, _ram.Fd);
        Client.Map(0x20000, Page, null);
        foreach ((ulong address, ulong size) in (ReadOnlySpan<(ulong, ulong)>)[(0x10000, Page), (0x11000, 3 * Page), (0x10000, 5 * Page), (0x30000, Page), (0, 0)])
            Client.Fails(Errno.ENOENT, VfioUserCommand.DmaUnmap, UnmapRequest(address, size));
        Client.Invalid(VfioUserCommand.DmaUnmap, 23, 0, 0x10000UL, 4 * Page);
        Client.Invalid(VfioUserCommand.DmaUnmap, 0x100001, 0, 0x10000UL, 4 * Page);
        Client.Invalid(VfioUserCommand.DmaUnmap, 24, 4, 0x10000UL, 4 * Page);
        Client.Invalid(VfioUserCommand.DmaUnmap, 24, 3, 0x10000UL, 4 * Page);
        Client.Invalid(VfioUserCommand.DmaUnmap, 24, 2, 0x10000UL, 0UL);
        Client.Invalid(VfioUserCommand.DmaUnmap, 24, 0, 0x10000UL);
        Client.Invalid(VfioUserCommand.DmaUnmap, 48, 1, 0x10000UL, 4 * Page, Page, 8UL);
        byte[] request = UnmapRequest(0x10000, 4 * Page);
        Assert.That(Client.Ok(VfioUserCommand.DmaUnmap, request), Is.EqualTo(request));
        Assert.That(Write(0x10000, 1), Is.EqualTo(Errno.EFAULT));
        request = UnmapRequest(0, 0, 2);
        for (int i = 0; i < 2; i++) Assert.That(Client.Ok(VfioUserCommand.DmaUnmap, request), Is.EqualTo(request));
        Assert.That(Dma.RegionCount, Is.Zero);
    }

    [Test]
    public void S21_TheDeviceIsQuietWhileMapsChange()
    {
        Client.Map(0, Page, _ram.Fd);
        Client.Ok(VfioUserCommand.DmaUnmap, UnmapRequest(0, Page));
        Assert.That(Fake.Log, Is.EqualTo((string[])["quiesce", "unquiesce", "quiesce", "unquiesce"]));
        Assert.That(Fake.Quiesced, Is.Zero);
    }

    [Test]
    public void S34_ADeviceThatDoesNotBecomeQuietMakesTheRequestFailWithEio()
    {
        Fake.OnQuiesce = static () => ValueTask.FromResult(Errno.EBUSY);
        Client.Fails(Errno.EIO, VfioUserCommand.DmaMap, MapRequest(0, Page), _ram.Fd);
        var never = new TaskCompletionSource<Errno>();
        using var slow = new ServedDevice(new FakeVfioUserBackend { OnQuiesce = () => new ValueTask<Errno>(never.Task) }, new VfioUserServerOptions { QuiesceTimeout = TimeSpan.FromMilliseconds(50) });
        using (RawVfioUserClient client = slow.Attach())
        {
            client.Fails(Errno.EIO, VfioUserCommand.DmaMap, MapRequest(0, Page), _ram.Fd);
            client.Fails(Errno.EIO, VfioUserCommand.DeviceReset, []);
            client.Ok(VfioUserCommand.DeviceGetInfo, Bytes(16, 0, 0, 0));
            never.SetResult(Errno.None);
            client.Ok(VfioUserCommand.DmaMap, MapRequest(0, Page), _ram.Fd);
        }
        Fake.OnQuiesce = static () => ValueTask.FromResult(Errno.None);
    }

    [Test]
    public void ALateQuiesceKeepsTheNextRequestsWaitingAndCompletesTheFirstOnce()
    {
        var quiet = new TaskCompletionSource<Errno>(TaskCreationOptions.RunContinuationsAsynchronously);
        Fake.OnQuiesce = () => new ValueTask<Errno>(quiet.Task);
        Client.Send(VfioUserCommand.DmaMap, MapRequest(0, Page), [_ram.Fd], id: 1);
        Client.Send(VfioUserCommand.DeviceGetInfo, Bytes(16, 0, 0, 0), id: 2);
        LeakCheck.WaitFor(() => Served.Server.Stats.Messages >= 1, "the request did not arrive");
        Assert.That(Client.HasNothingToRead);
        quiet.SetResult(Errno.None);
        using VfioUserReply first = Client.Receive(), second = Client.Receive();
        Assert.That((first.Header.Id, second.Header.Id), Is.EqualTo(((ushort)1, (ushort)2)));
        Assert.That(Dma.RegionCount, Is.EqualTo(1));
    }

    [Test]
    public void S19_MapsWithoutADescriptorGoByMessages()
    {
        Client.Map(0xfffc0000, 0x40000, null, flags: 1);
        Client.Map(0xe000_0000, 0x4000, null);
        byte[] data = new byte[16];
        Task<Errno> read = Task.Run(() => Dma.Read(0xfffc0010, data));
        using (VfioUserReply request = Client.Receive())
        {
            Assert.That((request.Header.Command, request.Header.Flags), Is.EqualTo((VfioUserCommand.DmaRead, 0u)));
            Assert.That(request.Payload, Is.EqualTo(Bytes(0xfffc0010UL, 16UL)));
            Client.Send(VfioUserCommand.DmaRead, Bytes(0xfffc0010UL, 16UL, 1, 2, 3, 4), flags: 1, id: request.Header.Id);
        }
        Assert.That((read.Result, data), Is.EqualTo((Errno.None, Bytes(1, 2, 3, 4))));
        Assert.That(Write(0xfffc0010, 1), Is.EqualTo(Errno.EPERM));
    }

    [Test]
    public void S22_AWriteIsAcknowledgedByItsHeadOrByABareHeader([Values(true, false)] bool bare)
    {
        Client.Map(0, Page, null);
        Task<Errno> write = Task.Run(() => Write(8, 4));
        using VfioUserReply request = Client.Receive();
        Assert.That(request.Payload, Is.EqualTo(Bytes(8UL, 4UL, 0xabababab)));
        Client.Send(VfioUserCommand.DmaWrite, bare ? [] : Bytes(8UL, 4UL), flags: 1, id: request.Header.Id);
        Assert.That(write.Result, Is.EqualTo(Errno.None));
    }

    [Test]
    public void S22_TheClientsErrorComesThroughAndAnswersThatDoNotFitAreProtocolErrors()
    {
        Client.Map(0, Page, null);
        Errno Answer(byte[] payload, uint flags = 1, Errno errno = Errno.None)
        {
            Task<Errno> read = Task.Run(() => Dma.Read(0, new byte[4]));
            using VfioUserReply request = Client.Receive();
            byte[] message = [.. new byte[16], .. payload];
            new VfioUserHeader(request.Header.Id, VfioUserCommand.DmaRead, (uint)message.Length, flags, errno).Write(message);
            Client.SendRaw(message);
            return read.Result;
        }
        Assert.That(Answer([], 0x21, Errno.ENODEV), Is.EqualTo(Errno.ENODEV));
        Assert.That(Answer([], 0x21), Is.EqualTo(Errno.EIO), "an error reply without an errno becomes EIO");
        Assert.That(Answer(Bytes(0UL, 4UL)), Is.EqualTo(Errno.EPROTO));
        Assert.That(Answer(Bytes(0UL, 4UL, 0UL)), Is.EqualTo(Errno.EPROTO));
        Assert.That(Answer(Bytes(8UL, 4UL, 0)), Is.EqualTo(Errno.EPROTO));
        Assert.That(Answer(Bytes(0UL, 4UL, 0)), Is.EqualTo(Errno.None));
    }

    [Test]
    public void S23_NoMessagesTowardsAClientThatMapsEverything()
    {
        Client.Map(0, 256 * Page, _ram.Fd);
        for (ulong at = 0; at < 256 * Page; at += Page) Assert.That(Write(at, 8), Is.EqualTo(Errno.None));
        Assert.That((Client.HasNothingToRead, Served.Server.Stats.DmaMessages), Is.EqualTo((true, 0L)));
    }

    [Test]
    public void MessagesAreSplitByTheClientsLimit()
    {
        Client.Dispose();
        using RawVfioUserClient small = Served.Attach("""{"capabilities":{"max_data_xfer_size":1024}}""");
        small.Map(0, Page, null);
        Task<Errno> write = Task.Run(() => Write(0, 4096));
        for (ulong at = 0; at < Page; at += 1024)
        {
            using VfioUserReply request = small.Receive();
            Assert.That(request.Payload[..16], Is.EqualTo(Bytes(at, 1024UL)));
            small.Send(VfioUserCommand.DmaWrite, Bytes(at, 1024UL), flags: 1, id: request.Header.Id);
        }
        Assert.That(write.Result, Is.EqualTo(Errno.None));
    }

    [Test]
    public void S30_ARegisterAccessNeverWaitsForDmaByMessage()
    {
        Client.Map(0, Page, null);
        var result = new TaskCompletionSource<Errno>();
        Fake.OnWrite = _ => result.SetResult(Write(0, 4));
        Client.RegionWrite(0, 0, 1);
        Assert.That(result.Task.Result, Is.EqualTo(Errno.EDEADLK));
    }

    [Test]
    public void S32_AnswersToDmaAreReadWhileARequestWaitsForTheDevice()
    {
        Client.Map(0, Page, null);
        // The device becomes quiet only once the client has answered its DMA, which comes on the same stream as the client's commands.
        Task<Errno> write = null!;
        Fake.OnQuiesce = async () => await (write = Task.Run(() => Write(0, 4)));
        Client.Send(VfioUserCommand.DmaMap, MapRequest(Page, Page), id: 1);
        using VfioUserReply request = Client.Receive();
        Assert.That(request.Header.Command, Is.EqualTo(VfioUserCommand.DmaWrite));
        // A command that arrives before the DMA reply must wait.
        Client.Send(VfioUserCommand.DeviceGetInfo, Bytes(16, 0, 0, 0), id: 2);
        Client.Send(VfioUserCommand.DmaWrite, [], flags: 1, id: request.Header.Id);
        using VfioUserReply first = Client.Receive(), second = Client.Receive();
        Assert.That((first.Header.Id, first.Header.Errno, second.Header.Id), Is.EqualTo(((ushort)1, Errno.None, (ushort)2)));
        Fake.OnQuiesce = static () => ValueTask.FromResult(Errno.None);
    }

    [Test]
    public void DmaByTheTwinSocketLeavesTheMainOneAlone()
    {
        Client.Dispose();
        using RawVfioUserClient main = Served.Connect();
        using VfioUserReply reply = main.Ask(VfioUserCommand.Version, Version("""{"capabilities":{"twin_socket":{"supported":true}},"room":""" + $"\"{new string('.', 100)}\"}}"));
        using var twin = new RawVfioUserClient(reply.Fds[0]);
        main.Map(0, Page, null);
        Task<Errno> write = Task.Run(() => Write(8, 4));
        using VfioUserReply request = twin.Receive();
        twin.Send(VfioUserCommand.DmaWrite, [], flags: 1, id: request.Header.Id);
        Assert.That((write.Result, main.HasNothingToRead), Is.EqualTo((Errno.None, true)));
    }

    [Test]
    public void AClientThatGoesEndsTheDmaThatWaitsForIt()
    {
        Client.Map(0, Page, null);
        Task<Errno> write = Task.Run(() => Write(0, 4));
        Client.Receive().Dispose();
        Client.HangUp();
        Assert.That(write.Result, Is.EqualTo(Errno.ENOTCONN).Or.EqualTo(Errno.EPIPE));
    }

    [Test]
    public void S25_WritesThroughDescriptorsAreReportedOnceAndWritesByMessageNever()
    {
        Client.Map(0, 64 * Page, _ram.Fd);
        Client.Map(64 * Page, 64 * Page, _ram.Fd, 64 * Page, flags: 3 | 8);
        Client.Map(128 * Page, Page, null);
        Write(0, 8);
        Client.StartLog();
        Assert.That(Client.Report(0, 64 * Page), Is.Empty, "the log has no write from before its start");
        Write((3 * Page) - 4, 8);
        Write(70 * Page, 1);
        Dma.Read(20 * Page, new byte[64]);
        Task<Errno> message = Task.Run(() => Write(128 * Page, 4));
        using (VfioUserReply request = Client.Receive()) Client.Send(VfioUserCommand.DmaWrite, [], flags: 1, id: request.Header.Id);
        Assert.That(message.Result, Is.EqualTo(Errno.None));
        Assert.That(Client.Report(0, 64 * Page), Is.EqualTo((int[])[2, 3]));
        Assert.That(Client.Report(0, 64 * Page), Is.Empty, "a report clears the log");
        Assert.That(Client.Report(0, 129 * Page), Is.EqualTo((int[])[70]));
        Assert.That(Client.Report(128 * Page, Page), Is.Empty, "a range without a descriptor is clean: the client saw the writes to it");
    }

    [Test]
    public void S24_AnyRangeIsReportedHolesIncluded()
    {
        Client.Map(0x10000, 16 * Page, _ram.Fd);
        Client.Map(0x40000, 16 * Page, _ram.Fd, 16 * Page);
        Client.StartLog();
        Write(0x12000, 1);
        Write(0x15000, 1);
        Write(0x41000, 1);
        Assert.That(Client.Report(0x12000, 2 * Page), Is.EqualTo((int[])[0]), "a report on a part of a map clears that part's page");
        Assert.That(Client.Report(0, 0x60000), Is.EqualTo((int[])[0x15, 0x41]), "a report covers both maps and the hole between them");
        Assert.That(Client.Report(0x80000, Page), Is.Empty, "a hole is clean");
        Assert.That(Client.Report(0x1000_0000_0000, 1000 * Page), Is.Empty);
    }

    [Test]
    public void S24_OtherPageSizesAndPartsOfAPageLoseNothing()
    {
        Client.Map(0, 256 * Page, _ram.Fd);
        Client.StartLog();
        void Dirty() => Assert.That((Write(5 * Page, 1), Write(200 * Page, 1)), Is.EqualTo((Errno.None, Errno.None)));
        Dirty();
        Assert.That(Client.Report(0, 256 * Page, 2048), Is.EqualTo((int[])[10, 11, 400, 401]));
        Dirty();
        Assert.That(Client.Report(0, 256 * Page, 8192), Is.EqualTo((int[])[2, 100]));
        Dirty();
        Assert.That(Client.Report(0, 256 * Page, 65536), Is.EqualTo((int[])[0, 12]));
        Dirty();
        Assert.That(Client.Report(5 * Page, Page / 2, 2048), Is.EqualTo((int[])[0]));
        Assert.That(Client.Report(0, 256 * Page), Is.EqualTo((int[])[5, 200]), "a report on half a page does not clear the page");
    }

    [Test]
    public void S26_LoggingRequestsAreBounded()
    {
        Client.Fails(Errno.EINVAL, VfioUserCommand.DeviceFeature, ReportRequest(0, Page, Page));
        Client.Map(0, 64 * Page, _ram.Fd);
        foreach (ulong size in (ulong[])[0, 1, 2048, 4097, 12288, 1UL << 40]) Client.Invalid(VfioUserCommand.DeviceFeature, 24, 0x20006, size, 0, 0);
        Client.Invalid(VfioUserCommand.DeviceFeature, 24, 0x20006, Page, 1, 0);
        Client.Invalid(VfioUserCommand.DeviceFeature, 23, 0x20006, Page, 0, 0);
        Client.Invalid(VfioUserCommand.DeviceFeature, 16, 0x20006, Page);
        Client.StartLog();
        Client.StartLog();
        Client.Invalid(VfioUserCommand.DeviceFeature, 24, 0x20006, 2 * Page, 0, 0);
        foreach (ulong size in (ulong[])[0, 3, 4097]) Client.Invalid(VfioUserCommand.DeviceFeature, 4096, 0x10008, 0UL, Page, size);
        Client.Fails(Errno.EINVAL, VfioUserCommand.DeviceFeature, ReportRequest(0, 64 * Page, Page, argsz: 39));
        Client.Invalid(VfioUserCommand.DeviceFeature, uint.MaxValue, 0x10008, 0UL, 1UL << 60, 1UL);
        Client.Invalid(VfioUserCommand.DeviceFeature, uint.MaxValue, 0x10008, 0UL, 0UL, Page);
        Client.Invalid(VfioUserCommand.DeviceFeature, uint.MaxValue, 0x10008, ulong.MaxValue, Page, Page);
        Client.Invalid(VfioUserCommand.DeviceFeature, 64, 0x10008, 0UL, Page);
        Client.Ok(VfioUserCommand.DeviceFeature, Bytes(8, 0x20007));
        Client.Ok(VfioUserCommand.DeviceFeature, Bytes(16, 0x20007, 0UL));
        Client.Fails(Errno.EINVAL, VfioUserCommand.DeviceFeature, ReportRequest(0, Page, Page));
        // A log of all these maps would take 2 GiB; the log is only kept for maps with descriptors, so the start must succeed.
        for (ulong i = 1; i < 9; i++) Client.Map(i << 43, 8UL << 40, null);
        Client.StartLog();
    }

    [Test]
    public void UnmapWithABitmapGivesTheLastReport()
    {
        Client.Map(0x100000, 16 * Page, _ram.Fd);
        Client.Map(0x200000, Page, _ram.Fd);
        Client.StartLog();
        Write(0x101000, 1);
        Write(0x103000, 1);
        Write(0x200000, 1);
        Client.Invalid(VfioUserCommand.DmaUnmap, 48, 1, 0x100000UL, 16 * Page, Page, 16UL);
        Client.Invalid(VfioUserCommand.DmaUnmap, 47, 1, 0x100000UL, 16 * Page, Page, 8UL);
        Client.Invalid(VfioUserCommand.DmaUnmap, 48, 1, 0x100000UL, 16 * Page, 0UL, 8UL);
        Client.Invalid(VfioUserCommand.DmaUnmap, 48, 1, 0x100000UL, 16 * Page, Page);
        byte[] request = Bytes(48, 1, 0x100000UL, 16 * Page, Page, 8UL);
        Assert.That(Client.Ok(VfioUserCommand.DmaUnmap, request), Is.EqualTo(Bytes(request, 0xaUL)));
        Assert.That(Client.Report(0x200000, Page), Is.EqualTo((int[])[0]), "the unmap leaves the other map's log as it is");
    }

    [Test]
    public void MapsMadeWhileLoggingStartClean()
    {
        Client.StartLog();
        Client.Map(0, 4 * Page, _ram.Fd);
        Assert.That(Client.Report(0, 4 * Page), Is.Empty);
        Write(Page, 1);
        Assert.That(Client.Report(0, 4 * Page), Is.EqualTo((int[])[1]));
    }

    [Test]
    public void AWriteToATruncatedFileIsAnErrorAndDoesNotEnlargeTheFile()
    {
        using OwnedFd file = Posix.MemFd("truncated");
        Posix.Truncate(file, 4 * (long)Page);
        Client.Map(0, 4 * Page, file, flags: 3 | 8);
        Assert.That((Write(3 * Page, 16), Dma.Read(3 * Page, new byte[16])), Is.EqualTo((Errno.None, Errno.None)));
        Posix.Truncate(file, 2 * (long)Page);
        Assert.That((Write(3 * Page, 16), Dma.Read(3 * Page, new byte[16])), Is.EqualTo((Errno.EFAULT, Errno.EFAULT)));
        Assert.That(Write((2 * Page) - 8, 16), Is.EqualTo(Errno.EFAULT), "part of it is behind the end");
        Posix.Stat(file, out FileStatus status);
        Assert.That(status.SizeBytes, Is.EqualTo(2 * (long)Page));
        Assert.That(Write(Page, 16), Is.EqualTo(Errno.None), "the rest of the file still works");
    }

    [Test]
    public void AStoppedDeviceCannotChangeMemory()
    {
        Client.Map(0, Page, _ram.Fd);
        Client.SetState(VfioDeviceState.StopCopy);
        Assert.That(Write(0, 1), Is.EqualTo(Errno.EAGAIN));
        Client.SetState(VfioDeviceState.Running);
        Assert.That(Write(0, 1), Is.EqualTo(Errno.None));
    }
}
