using System.Diagnostics;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Client;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.ScriptedVfioUserServer;

namespace Vmm.Tests.Unit.Vfio.User;

/// <summary>The vfio-user backend of the VFIO device interface: attach, interrupts, areas, DMA, lost servers.</summary>
[TestFixture]
public class VfioUserDeviceIoTests
{
    private static readonly VfioIrqSetFlags s_bind = VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionTrigger;

    [Test]
    public void RamIsMappedBeforeAnythingElseUpTo16RequestsAtATime()
    {
        var underway = new List<VfioUserMessage>();
        int most = 0;
        var server = new ScriptedVfioUserServer();
        server.On(VfioUserCommand.DmaMap, m =>
        {
            // Hold back the first 16 replies; a client that waited for each reply would hang here.
            underway.Add(m);
            most = Math.Max(most, underway.Count);
            if (underway.Count < 16 && server.Received.Count(static r => r.Command == VfioUserCommand.DmaMap) < 20) return;
            foreach (VfioUserMessage one in underway) server.Reply(one);
            underway.Clear();
        });
        server.Start();
        using var memory = new GuestMemory();
        for (int i = 0; i < 20; i++) memory.AddBlock(new RamBlockOptions { Name = $"b{i}", SizeBytes = 8192 });
        using (var io = VfioUserDeviceIo.Open(new VfioUserOptions { SocketPath = "test" }, memory, server.ClientSocket))
        {
            List<VfioUserMessage> all = server.Received;
            Assert.That(all.Skip(1).Take(20).Select(static m => m.Command), Is.All.EqualTo(VfioUserCommand.DmaMap));
            Assert.That(most, Is.EqualTo(16));
            RamBlock late = memory.AddBlock(new RamBlockOptions { Name = "late", SizeBytes = 4096 });
            memory.RemoveBlock(late);
            VfioUserMessage unmap = server.Received[^1];
            Assert.That(VfioUserDmaUnmap.TryRead(unmap.Body, out VfioUserDmaUnmap gone));
            Assert.That((unmap.Command, gone.Size, gone.Flags), Is.EqualTo((VfioUserCommand.DmaUnmap, 4096, 0)));
        }
        server.Dispose();
    }

    [Test]
    public void AServerCannotShrinkTheRamItWasGiven()
    {
        using var rig = new VfioUserRig();
        OwnedFd given = rig.Server.Received.Single(static m => m.Command == VfioUserCommand.DmaMap).Fds.Single();
        Assert.That(Posix.Truncate(given, 0), Is.EqualTo(Errno.EPERM));
    }

    [Test]
    public void ARefusedMapKeepsRamFromAppearing()
    {
        var server = new ScriptedVfioUserServer();
        bool refuse = false;
        server.On(VfioUserCommand.DmaMap, m =>
        {
            if (refuse) server.Error(m, Errno.ENOSPC);
            else server.Reply(m);
        });
        using var rig = new VfioUserRig(server);
        refuse = true;
        Assert.That(() => rig.Memory.AddBlock(new RamBlockOptions { Name = "more", SizeBytes = 4096 }), Throws.TypeOf<VfioException>().With.Message.Contains("'more'"));
        Assert.That(rig.Memory.Blocks, Has.Count.EqualTo(1));
    }

    [Test]
    public void BoundAndUnboundVectorsTravelInMessagesOfTheirOwn()
    {
        using var rig = new VfioUserRig();
        OwnedFd[] fds = [.. Enumerable.Range(0, 20).Select(static _ => Posix.EventFd())];
        OwnedFd?[] vectors = [null, .. fds, null, null];
        Assert.That(rig.Io.SetIrqs(new VfioIrqSet(s_bind, VfioPciIrq.Msix, 4, (uint)vectors.Length), default, vectors), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataNone | VfioIrqSetFlags.ActionTrigger, VfioPciIrq.Msix, 0, 0), default, default), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataBool | VfioIrqSetFlags.ActionMask, VfioPciIrq.Msix, 1, 2), [1, 0], default), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.SetIrqs(new VfioIrqSet(s_bind, VfioPciIrq.Msix, 0, 2), default, [null]), Is.EqualTo(Errno.EINVAL), "the request needs one descriptor or null for each vector");
        Assert.That(rig.Server.Received.Where(static m => m.Command == VfioUserCommand.DeviceSetIrqs).Select(static m =>
        {
            VfioUserIrqSet.TryRead(m.Body, out VfioUserIrqSet set);
            Assert.That(set.ArgSz, Is.EqualTo(m.Body.Length));
            return ((uint)set.Flags, set.Start, set.Count, m.Fds.Count);
        }), Is.EqualTo(((uint, uint, uint, int)[])[(0x24, 4, 1, 0), (0x24, 5, 8, 8), (0x24, 13, 8, 8), (0x24, 21, 4, 4), (0x24, 25, 2, 0), (0x21, 0, 0, 0), (0x0a, 1, 2, 0)]));
        foreach (OwnedFd fd in fds) fd.Dispose();
    }

    [Test]
    public void AreasAreMappedByTheDescriptorOfTheSecondReply([Values] bool noMmap)
    {
        using OwnedFd file = Posix.MemFd("bar");
        Posix.Truncate(file, 0x6000);
        Posix.PWrite(file, [0xab, 0xcd], 0x4000, out _);
        ScriptedVfioUserServer server = SparseServer(file, (0x1000, 0x1000), (0x3000, 0), (0x3000, 0x1000));
        using var rig = new VfioUserRig(server, o => o with { NoMmap = noMmap });
        VfioRegionInfo bar = rig.Io.GetRegionInfo(0);
        Assert.That(bar.SizeBytes, Is.EqualTo(0x4000));
        if (noMmap)
        {
            Assert.That((bar.Areas.Count, bar.Flags), Is.EqualTo((0, VfioRegionFlags.Read | VfioRegionFlags.Write)));
            return;
        }
        Assert.That(bar.Areas, Is.EqualTo((VfioRegionArea[])[new(0x1000, 0x1000), new(0x3000, 0x1000)]));
        using (MappedRegion map = rig.Io.MapArea(0, bar.Areas[1])!)
        {
            Assert.That(map.Slice(0, 2).ToArray(), Is.EqualTo((byte[])[0xab, 0xcd]), "region offset 0x1000 in the file, area 0x3000");
        }
        Posix.Truncate(file, 0x4800);
        Assert.That(rig.Io.MapArea(0, bar.Areas[1]), Is.Null, "an access to a file that is too short would raise SIGBUS");
        Assert.That(rig.Io.MapArea(0, new VfioRegionArea(0, 0x1000)), Is.Null, "the server does not offer this area");
        Assert.That(rig.Io.RegionWrite(0, 0, new byte[4], posted: true), Is.EqualTo(Errno.None));
        Assert.That(rig.Server.Received[^1].Header.WantsNoReply, Is.False, "the client posts no write to a region with areas, because a posted write has no order with them");
    }

    /// <summary>A server whose BAR 0 has a sparse capability and a descriptor; the client needs two requests to read it.</summary>
    private static ScriptedVfioUserServer SparseServer(OwnedFd file, params (ulong Offset, ulong Size)[] areas)
    {
        var server = new ScriptedVfioUserServer();
        server.On(VfioUserCommand.DeviceGetRegionInfo, m =>
        {
            VfioUserRegionInfo.TryRead(m.Body, out VfioUserRegionInfo ask);
            int full = ask.Index == 0 ? 48 + (16 * areas.Length) : 32;
            bool all = ask.ArgSz >= full;
            byte[] body = new byte[all ? full : 32];
            new VfioUserRegionInfo((uint)full, ask.Index == 0 ? all ? 15u : 7u : 0, ask.Index, all && full > 32 ? 32u : 0, ask.Index == 0 ? 0x4000ul : 0, ask.Index == 0 ? 0x1000ul : 0).Write(body);
            if (body.Length > 32)
            {
                ((byte[])[1, 0, 1, 0, 0, 0, 0, 0, (byte)areas.Length, 0, 0, 0]).CopyTo(body, 32);
                for (int i = 0; i < areas.Length; i++) new VfioUserDmaAccess(areas[i].Offset, areas[i].Size).Write(body.AsSpan(48 + (16 * i)));
                server.Reply(m, body, file);
            }
            else
            {
                server.Reply(m, body);
            }
        });
        return server;
    }

    [TestCase(0x1000ul, 0x3001ul)]
    [TestCase(0x800ul, 0x1000ul)]
    [TestCase(0x4000ul, 0x1000ul)]
    [TestCase(0xfffffffffffff000ul, 0x2000ul)]
    public void AreasOutsideTheRegionOrItsPagesAreRefused(ulong offset, ulong size)
    {
        using OwnedFd file = Posix.MemFd("bar");
        Assert.That(() => new VfioUserRig(SparseServer(file, (offset, size))), Throws.TypeOf<VfioUserProtocolException>().With.Message.Contains("region 0"));
    }

    [Test]
    public void MoreThan64AreasAreRefused()
    {
        using OwnedFd file = Posix.MemFd("bar");
        Assert.That(() => new VfioUserRig(SparseServer(file, [.. Enumerable.Repeat((0ul, 0x1000ul), 65)])), Throws.TypeOf<VfioUserProtocolException>());
    }

    [TestCase(33u, 32u, 32u, "offset inside the last bytes")]
    [TestCase(48u, 8u, 0u, "inside the fixed part")]
    [TestCase(48u, 32u, 32u, "a loop")]
    [TestCase(70_000u, 32u, 0u, "too long")]
    public void ACapabilityChainOutOfBoundsIsRefused(uint argsz, uint capOffset, uint next, string why)
    {
        var server = new ScriptedVfioUserServer();
        server.On(VfioUserCommand.DeviceGetRegionInfo, m => server.Reply(m, Bytes((int)Math.Min(argsz, 48), b =>
        {
            new VfioUserRegionInfo(argsz, 8 | 3, LittleEndian.U32(m.Body, 8), capOffset, 0x1000, 0).Write(b);
            if (b.Length >= 40) new VfioUserIrqInfo(0x10063, next, 0, 0).Write(b.AsSpan(32));
        })));
        Assert.That(() => new VfioUserRig(server), Throws.TypeOf<VfioUserProtocolException>(), why);
    }

    [TestCase(101u, 5u)]
    [TestCase(9u, 51u)]
    [TestCase(uint.MaxValue, uint.MaxValue)]
    public void TooManyRegionsOrInterruptsAreRefused(uint regions, uint irqs) =>
        Assert.That(() => new VfioUserRig(new ScriptedVfioUserServer { Regions = regions, Irqs = irqs }), Throws.TypeOf<VfioUserProtocolException>());

    [Test]
    public void TooManyVectorsAreRefused()
    {
        var server = new ScriptedVfioUserServer();
        server.On(VfioUserCommand.DeviceGetIrqInfo, m => server.Reply(m, Bytes(16, b => new VfioUserIrqInfo(16, 1, LittleEndian.U32(m.Body, 8), 2049).Write(b))));
        Assert.That(() => new VfioUserRig(server), Throws.TypeOf<VfioUserProtocolException>().With.Message.Contains("2049"));
    }

    [Test]
    public void RegionsAndInterruptsThatTheServerRefusesAreAbsent()
    {
        var server = new ScriptedVfioUserServer();
        server.On(VfioUserCommand.DeviceGetRegionInfo, m => server.Error(m, Errno.EINVAL)).On(VfioUserCommand.DeviceGetIrqInfo, m => server.Error(m, Errno.EINVAL));
        using var rig = new VfioUserRig(server);
        Assert.That((rig.Io.GetRegionInfo(0).IsPresent, rig.Io.GetRegionInfo(99).IsPresent, rig.Io.GetIrqInfo(0).Count, rig.Io.GetIrqInfo(99).Count), Is.EqualTo((false, false, 0, 0)));
    }

    [Test]
    public void PostedWritesWaitForNothingAndComeBeforeALaterRead()
    {
        using var rig = new VfioUserRig();
        for (byte i = 0; i < 5; i++) Assert.That(rig.Io.RegionWrite(0, i, [i], posted: true), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.RegionWrite(VfioPciRegion.Config, 4, [7], posted: true), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.RegionRead(0, 0, new byte[4]), Is.EqualTo(Errno.None));
        Assert.That(rig.Server.Received.Where(static m => m.Command is VfioUserCommand.RegionRead or VfioUserCommand.RegionWrite).Select(static m => (m.Header.WantsNoReply, m.Access.Offset)),
            Is.EqualTo(((bool, ulong)[])[(true, 0), (true, 1), (true, 2), (true, 3), (true, 4), (false, 4), (false, 0)]));
    }

    [Test]
    public void DmaIsRefusedByTheBookAndMarksWhatItWrites()
    {
        var answers = new List<(string, Errno)>();
        var server = new ScriptedVfioUserServer();
        VfioUserRig? rig = null;
        server.On(VfioUserCommand.RegionRead, m =>
        {
            void Try(string what, VfioUserCommand command, byte[] body) => answers.Add((what, server.Ask(command, body).Header.Errno));
            Try("no bus master", VfioUserCommand.DmaRead, Dma(0, 4));
            rig!.Io.SetBusMaster(true);
            Try("read", VfioUserCommand.DmaRead, Dma(0xffffc, 4));
            Try("over the end", VfioUserCommand.DmaRead, Dma(0xffffd, 4));
            Try("wraps", VfioUserCommand.DmaWrite, Dma(ulong.MaxValue - 1, 4, [1, 2, 3, 4]));
            Try("unmapped", VfioUserCommand.DmaWrite, Dma(1ul << 40, 4, [1, 2, 3, 4]));
            Try("too much", VfioUserCommand.DmaRead, Dma(0, (1 << 20) + 1));
            Try("too much", VfioUserCommand.DmaWrite, Dma(0, (1 << 20) + 1, new byte[(1 << 20) + 1]));
            Try("short", VfioUserCommand.DmaRead, [1, 2, 3]);
            Try("less data than said", VfioUserCommand.DmaWrite, Dma(0, 4, [1, 2, 3]));
            Try("other command", VfioUserCommand.RegionRead, new byte[16]);
            Try("write", VfioUserCommand.DmaWrite, Dma(0x1fff, 2, [1, 2]));
            server.Reply(m, [.. m.Body, .. new byte[m.Access.Count]]);
        });
        using (rig = new VfioUserRig(server))
        {
            rig.Memory.StartDirtyLog();
            Assert.That(rig.Io.RegionRead(0, 0, new byte[4]), Is.EqualTo(Errno.None));
            Assert.That(answers, Is.EqualTo(((string, Errno)[])
            [
                ("no bus master", Errno.ENODEV), ("read", Errno.None), ("over the end", Errno.ENODEV), ("wraps", Errno.ENODEV), ("unmapped", Errno.ENODEV),
                ("too much", Errno.E2BIG), ("too much", Errno.E2BIG), ("short", Errno.EINVAL), ("less data than said", Errno.EINVAL), ("other command", Errno.ENOSYS), ("write", Errno.None),
            ]));
            var dirty = new DirtyBitmap(rig.Ram.PageCount);
            rig.Memory.HarvestDirtyLog(rig.Ram, dirty);
            Assert.That((dirty.Count(), dirty.IsSet(1), dirty.IsSet(2)), Is.EqualTo((2, true, true)));
            rig.Memory.StopDirtyLog();
        }
    }

    [Test]
    public void AMissingReplyClosesTheConnectionWithTheReasonFirst()
    {
        var server = new ScriptedVfioUserServer();
        server.On(VfioUserCommand.RegionRead, static _ => { });
        using var rig = new VfioUserRig(server, o => o with { TimeoutMs = 2000 });
        using var lost = new ManualResetEventSlim();
        VmmException? reason = null;
        rig.Io.Lost += e =>
        {
            reason = e;
            lost.Set();
        };
        Assert.That(rig.Io.RegionRead(0, 0, new byte[4]), Is.EqualTo(Errno.ENODEV));
        Assert.That(lost.Wait(TimeSpan.FromSeconds(30)));
        Assert.That((reason!.Errno, reason.Message), Is.EqualTo((Errno.ETIMEDOUT, "vfio-user 'test': no reply to RegionRead in 2000 ms")));
        Assert.That(rig.Io.LostReason, Is.SameAs(reason));
        using var late = new ManualResetEventSlim();
        rig.Io.Lost += _ => late.Set();
        Assert.That(late.Wait(TimeSpan.FromSeconds(30)), "a late subscriber receives the event too");
    }

    [Test]
    public void AServerThatTakesNoBytesIsLostToo()
    {
        using var stop = new ManualResetEventSlim();
        var server = new ScriptedVfioUserServer();
        server.On(VfioUserCommand.DeviceReset, m =>
        {
            server.Reply(m);
            stop.Wait(TimeSpan.FromSeconds(20));
        });
        using var rig = new VfioUserRig(server, o => o with { TimeoutMs = 2000 });
        Assert.That(rig.Io.Reset(), Is.EqualTo(Errno.None));
        var clock = Stopwatch.StartNew();
        byte[] data = new byte[60_000];
        Errno errno = Errno.None;
        while (errno == Errno.None && clock.Elapsed < TimeSpan.FromSeconds(10)) errno = rig.Io.RegionWrite(0, 0, data, posted: true);
        stop.Set();
        Assert.That((errno, rig.Io.LostReason?.Errno), Is.EqualTo((Errno.ENODEV, Errno.ETIMEDOUT)));
    }

    [Test]
    public void AfterTheServerIsGoneEverythingAnswersEnodevAtOnce()
    {
        using var rig = new VfioUserRig();
        using var lost = new ManualResetEventSlim();
        rig.Io.Lost += _ => lost.Set();
        rig.Server.Hangup();
        Assert.That(lost.Wait(TimeSpan.FromSeconds(30)));
        var clock = Stopwatch.StartNew();
        Assert.That(rig.Io.RegionRead(0, 0, new byte[4]), Is.EqualTo(Errno.ENODEV));
        Assert.That(rig.Io.RegionWrite(0, 0, new byte[4], posted: true), Is.EqualTo(Errno.ENODEV));
        Assert.That(rig.Io.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataNone | VfioIrqSetFlags.ActionTrigger, 0, 0, 0), default, default), Is.EqualTo(Errno.ENODEV));
        Assert.That(rig.Io.DeviceFeature(VfioDeviceFeature.Migration, VfioFeatureOp.Get, new byte[8]), Is.EqualTo(Errno.ENODEV));
        Assert.That(rig.Io.SetMigrationState(VfioDeviceState.Stop, out _), Is.EqualTo(Errno.ENODEV));
        Assert.That(rig.Io.StartDmaLog(4096, [], out _), Is.EqualTo(Errno.ENODEV));
        Assert.That(rig.Io.Reset(), Is.EqualTo(Errno.ENODEV));
        Assert.That(clock.Elapsed, Is.LessThan(TimeSpan.FromSeconds(2)));
        Assert.That(() => rig.Memory.RemoveBlock(rig.Memory.AddBlock(new RamBlockOptions { Name = "more", SizeBytes = 4096 })), Throws.Nothing, "the VM can still add and remove RAM");
    }

    [TestCase("0100090011000000010000000000000000", "a reply nobody waits for")]
    [TestCase("01000b000f00000000000000000000", "a size below a header")]
    [TestCase("01000b0010000000020000000000000000", "neither command nor reply")]
    [TestCase("01000b00ffffffff0000000000000000", "a command of 4 GiB")]
    public void AMessageThatBreaksTheProtocolEndsTheConnection(string hex, string why)
    {
        byte[] bytes = Convert.FromHexString(hex);
        var server = new ScriptedVfioUserServer();
        server.On(VfioUserCommand.DeviceReset, _ => server.Raw([.. bytes, .. new byte[16]]));
        using var rig = new VfioUserRig(server);
        Assert.That(rig.Io.Reset(), Is.EqualTo(Errno.ENODEV), why);
        Assert.That(rig.Io.LostReason, Is.TypeOf<VfioUserProtocolException>(), why);
    }

    [Test]
    public void RegionAccessesAllocateNothing()
    {
        using var rig = new VfioUserRig();
        byte[] data = new byte[4];
        for (int i = 0; i < 50; i++) rig.Io.RegionRead(0, 0, data);
        long before = GC.GetAllocatedBytesForCurrentThread();
        for (int i = 0; i < 100; i++)
        {
            rig.Io.RegionRead(0, 0, data);
            rig.Io.RegionWrite(0, 0, data);
            rig.Io.RegionWrite(0, 0, data, posted: true);
        }
        Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.LessThan(1000));
    }

    [Test]
    public void AChunkMayBeAsSmallAsTheServerWantsAndCutsNoRegister([Values(1, 4, 64)] int chunk)
    {
        // libvfio-user's GPIO sample takes reads of exactly 64 bytes.
        var asked = new List<int>();
        var server = new ScriptedVfioUserServer { HasMigration = true };
        server.KnowsFeatures(VfioDeviceFeature.Migration, VfioDeviceFeature.MigDeviceState)
            .OnFeature(VfioDeviceFeature.Migration, VfioFeatureOp.Get, m => server.Reply(m, [.. m.Body, .. BitConverter.GetBytes((ulong)VfioMigrationFlags.StopCopy)]));
        server.On(VfioUserCommand.MigDataRead, m =>
        {
            asked.Add(BitConverter.ToInt32(m.Body, 4));
            int n = asked.Count > 2 ? 0 : asked[^1];
            server.Reply(m, [.. BitConverter.GetBytes(8 + n), .. BitConverter.GetBytes(n), .. new byte[asked[^1]]]);
        });
        VfioUserOptions options = VfioUserOptions.From(DeviceOptions.Parse($"vfio-user-pci,socket=test,x-mig-chunk={chunk}"));
        using var rig = new VfioUserRig(server, _ => options);
        Assert.That(rig.Io.SetMigrationState(VfioDeviceState.StopCopy, out IVfioMigrationData? data), Is.EqualTo(Errno.None));
        byte[] buffer = new byte[1 << 20];
        while (data!.Read(buffer, out _) > 0) { }
        Assert.That(asked, Is.EqualTo((int[])[chunk, chunk, chunk]));
        int before = rig.Server.Received.Count;
        Assert.That(rig.Io.RegionWrite(0, 0, new byte[8]), Is.EqualTo(Errno.None));
        Assert.That(rig.Server.Received.Skip(before).Select(static m => m.Access.Count), Is.EqualTo((uint[])[8]));
    }

    [Test]
    public void ConnectReadsItsOptionsAndNamesWhatIsWrong()
    {
        using var services = new TestServices();
        using var folder = new TempDirectory();
        VfioUserOptions o = VfioUserOptions.From(DeviceOptions.Parse("vfio-user-pci,socket=/x,x-msg-timeout=100,x-mig-timeout=7000,x-mig-chunk=1M,discard-pre-copy=on,x-no-mmap=on,x-no-posted-writes=on"));
        Assert.That(o, Is.EqualTo(new VfioUserOptions { SocketPath = "/x", TimeoutMs = 100, MigrationTimeoutMs = 7000, ChunkBytes = 1 << 20, DiscardPreCopy = true, NoMmap = true, NoPostedWrites = true }));
        Assert.That(() => VfioUserDeviceIo.Connect(DeviceOptions.Parse("vfio-user-pci"), services), Throws.TypeOf<ConfigurationException>());
        foreach (string chunk in (string[])["2M", "0"]) Assert.That(() => VfioUserOptions.From(DeviceOptions.Parse($"vfio-user-pci,socket=/x,x-mig-chunk={chunk}")), Throws.TypeOf<ConfigurationException>());
        // Without options: a stop waits for a server as long as for any reply, and a step with data not much longer.
        VfioUserOptions plain = VfioUserOptions.From(DeviceOptions.Parse("vfio-user-pci,socket=/x"));
        Assert.That((plain.TimeoutMs, plain.MigrationTimeoutMs, plain.ChunkBytes, plain.NoFeatures), Is.EqualTo((5000, 10_000, 64 << 10, false)));
        Assert.That(() => VfioUserDeviceIo.Connect(DeviceOptions.Parse($"vfio-user-pci,socket={folder["none"]}"), services), Throws.TypeOf<ChannelException>().With.Message.Contains("none").And.Property("Errno").EqualTo(Errno.ENOENT));
    }
}
