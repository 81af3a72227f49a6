using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.ScriptedVfioUserServer;

namespace Vmm.Tests.Unit.Vfio.User;

/// <summary>Framing, negotiation and the connection's life (vfio-user C-1 to C-8).</summary>
[TestFixture]
public class VfioUserClientTests
{
    [Test]
    public void C01_SixteenDescriptorsComeWithTheHeader()
    {
        OwnedFd[] fds = [.. Enumerable.Range(0, 16).Select(static _ => Posix.EventFd())];
        var server = new ScriptedVfioUserServer();
        server.On(VfioUserCommand.Version, m => server.Reply(m, new VfioUserVersion().ToPayload(), fds));
        using (var rig = new VfioUserRig(server)) Assert.That(rig.Io.Info.RegionCount, Is.EqualTo(9));
        foreach (OwnedFd fd in fds) fd.Dispose();
    }

    [Test]
    public void C02_HeaderBodyAndDescriptorsLeaveInOneMessage()
    {
        var found = new List<(int Have, int Said, int Fds)>();
        using var rig = new VfioUserRig(new ScriptedVfioUserServer(s =>
        {
            while (true)
            {
                int have = s.PeekWhole(out int said);
                VfioUserMessage m = s.Receive();
                found.Add((have, said, m.Fds.Count));
                s.Answer(m);
            }
        }));
        Assert.That(rig.Io.RegionWrite(0, 0, new byte[4000]), Is.EqualTo(Errno.None));
        using OwnedFd irq = Posix.EventFd();
        Assert.That(rig.Io.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionTrigger, 0, 0, 1), default, [irq]), Is.EqualTo(Errno.None));
        Assert.That(found.Where(static f => f.Have != f.Said), Is.Empty);
        Assert.That(found.Sum(static f => f.Fds), Is.EqualTo(2), "one descriptor for the map and one for the interrupt");
    }

    [Test]
    public void C03_DataMessagesStayAt64KiBUnlessTheOptionAllowsMore([Values(64, 256)] int chunkKiB)
    {
        using var rig = new VfioUserRig(options: o => o with { ChunkBytes = chunkKiB << 10 });
        byte[] data = new byte[600 << 10];
        Assert.That(rig.Io.RegionWrite(0, 16, data), Is.EqualTo(Errno.None));
        List<VfioUserRegionAccess> writes = [.. rig.Server.Received.Where(static m => m.Command == VfioUserCommand.RegionWrite).Select(static m => m.Access)];
        Assert.That(writes.Max(static w => w.Count), Is.EqualTo(chunkKiB << 10));
        Assert.That(writes.Sum(static w => w.Count), Is.EqualTo(data.Length));
        ulong at = 16;
        foreach (VfioUserRegionAccess w in writes)
        {
            Assert.That(w.Offset, Is.EqualTo(at));
            at += w.Count;
        }
    }

    [Test]
    public void C04_AnyFragmentationIsAcceptedAndStrayDescriptorsAreClosed()
    {
        using OwnedFd stray = Posix.EventFd();
        Posix.Stat(stray, out FileStatus before);
        var server = new ScriptedVfioUserServer { Fragments = true };
        server.On(VfioUserCommand.RegionRead, m => server.Reply(m, [.. m.Body, .. Enumerable.Range(0, (int)m.Access.Count).Select(static i => (byte)i)], stray, stray))
            .On(VfioUserCommand.DeviceGetIrqInfo, m => server.Reply(m, Bytes(16, b => new VfioUserIrqInfo(16, 1, m.Body[8], 1).Write(b)), stray));
        // Only stray descriptors hold the pipe's write end, so the read end reports POLLHUP as soon as all strays are closed.
        (OwnedFd read, OwnedFd write) = Posix.Pipe();
        using (read)
        {
            server.On(VfioUserCommand.RegionWrite, m =>
            {
                server.Reply(m, m.Body[..16], write);
                write.Dispose();
            });
            using var rig = new VfioUserRig(server);
            byte[] data = new byte[100];
            Assert.That(rig.Io.RegionRead(7, 0, data), Is.EqualTo(Errno.None));
            Assert.That(data, Is.EqualTo(Enumerable.Range(0, 100).Select(static i => (byte)i)));
            Assert.That(rig.Io.RegionWrite(7, 0, data), Is.EqualTo(Errno.None));
            Assert.That(Posix.Poll(read, Posix.POLLIN, null, 5000, out _) & Posix.POLLHUP, Is.Not.Zero, "the stray end is still open");
        }
    }

    [Test]
    public void C05_ProposesMinor2WithATwinSocketAndReadsALongReply()
    {
        var server = new ScriptedVfioUserServer();
        VfioUserVersion? proposal = null;
        server.On(VfioUserCommand.Version, m =>
        {
            proposal = VfioUserVersion.Parse(m.Body);
            byte[] json = [.. "{\"capabilities\":{\"max_msg_fds\":8,\"filler\":\""u8, .. Enumerable.Repeat((byte)'x', 60_000), .. "\"}}\0"u8];
            server.Reply(m, [0, 0, 1, 0, .. json]);
        });
        using var rig = new VfioUserRig(server);
        Assert.That((proposal!.Major, proposal.Minor, proposal.TwinSocket?.Supported, proposal.MaxMsgFds), Is.EqualTo((0, 2, true, 16)));
        Assert.That((rig.Io.Client.Server.Minor, rig.Io.Client.Server.MaxMsgFds, rig.Io.Client.HasTwinSocket), Is.EqualTo((1, 8, false)));
    }

    [Test]
    public void C05_TheServersLimitsApplyToEveryLaterMessage()
    {
        var server = new ScriptedVfioUserServer();
        server.On(VfioUserCommand.Version, m => server.Reply(m, new VfioUserVersion { MaxMsgFds = 3, MaxDataXferBytes = 1000 }.ToPayload()));
        using var rig = new VfioUserRig(server);
        OwnedFd[] fds = [.. Enumerable.Range(0, 8).Select(static _ => Posix.EventFd())];
        Assert.That(rig.Io.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionTrigger, 2, 0, 8), default, fds), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.RegionRead(0, 0, new byte[2500]), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.RegionWrite(0, 0, new byte[1001]), Is.EqualTo(Errno.None));
        List<VfioUserMessage> all = rig.Server.Received;
        Assert.That(all.Where(static m => m.Command == VfioUserCommand.DeviceSetIrqs).Select(static m => m.Fds.Count), Is.EqualTo((int[])[3, 3, 2]));
        Assert.That(all.Where(static m => m.Command == VfioUserCommand.RegionRead).Select(static m => m.Access.Count), Is.EqualTo((uint[])[1000, 1000, 500]));
        Assert.That(all.Where(static m => m.Command == VfioUserCommand.RegionWrite).Select(static m => m.Access.Count), Is.EqualTo((uint[])[1000, 1]));
        foreach (OwnedFd fd in fds) fd.Dispose();
    }

    [TestCase("{\"capabilities\":{\"max_msg_fds\":-1}}", 2)]
    [TestCase("{\"capabilities\":{\"twin_socket\":{\"supported\":true}}}", 2)]
    [TestCase("{\"capabilities\":{\"twin_socket\":{\"supported\":true,\"fd_index\":0}}}", 2)]
    [TestCase("{}", 3)]
    public void C05_ABadVersionReplyIsRefusedByName(string json, int minor)
    {
        var server = new ScriptedVfioUserServer();
        server.On(VfioUserCommand.Version, m => server.Reply(m, [0, 0, (byte)minor, 0, .. System.Text.Encoding.UTF8.GetBytes(json), 0]));
        Assert.That(() => new VfioUserRig(server), Throws.TypeOf<VfioUserProtocolException>().With.Message.Contains("'test'"));
    }

    [Test]
    public void C06_OneReportAMappingSoThatTheReplyFits()
    {
        var server = new ScriptedVfioUserServer();
        server.On(VfioUserCommand.Version, m => server.Reply(m, new VfioUserVersion { MaxMsgFds = 8, MaxDataXferBytes = 1024 }.ToPayload()))
            .KnowsFeatures(VfioDeviceFeature.DmaLoggingStart, VfioDeviceFeature.DmaLoggingReport)
            .OnFeature(VfioDeviceFeature.DmaLoggingReport, VfioFeatureOp.Get, m =>
            {
                VfioUserLogReport.TryRead(m.Body.AsSpan(8), out VfioUserLogReport ask);
                byte[] bitmap = new byte[VfioUserBitmap.BytesFor(ask.Size, ask.PageSize)];
                bitmap[^1] = 0x80;
                server.Reply(m, [.. m.Body, .. bitmap]);
            });
        using var rig = new VfioUserRig(server, ramBytes: 40 << 20);
        List<(ulong Address, ulong Size)> maps = [.. rig.Server.Received.Where(static m => m.Command == VfioUserCommand.DmaMap).Select(static m =>
        {
            VfioUserDmaMap.TryRead(m.Body, out VfioUserDmaMap map);
            Assert.That(map.Offset, Is.EqualTo(map.Address), "the block starts at address 0, so offset and address are equal");
            return (map.Address, map.Size);
        })];
        Assert.That(maps, Is.EqualTo(((ulong, ulong)[])[(0, 16 << 20), (16 << 20, 16 << 20), (32 << 20, 8 << 20)]));
        Assert.That(rig.Io.StartDmaLog(4096, [rig.Ram.Range], out _), Is.EqualTo(Errno.None));
        ulong[] bits = new ulong[rig.Ram.PageCount / 64];
        Assert.That(rig.Io.ReportDmaLog(rig.Ram.Range, 4096, bits), Is.EqualTo(Errno.None));
        Assert.That(rig.Server.Received.Where(static m => m.IsFeature(VfioDeviceFeature.DmaLoggingReport, VfioFeatureOp.Get)).Select(static m => (LittleEndian.U64(m.Body, 8), LittleEndian.U64(m.Body, 16))), Is.EqualTo(maps));
        Assert.That(bits.Index().Where(static w => w.Item != 0).Select(static w => (w.Index, w.Item)), Is.EqualTo(((int, ulong)[])[(63, 1UL << 63), (127, 1UL << 63), (159, 1UL << 63)]));
    }

    [Test]
    public void C07_AFailedConfigWriteIsAnErrnoAndTheDeviceLivesOn()
    {
        var server = new ScriptedVfioUserServer();
        server.On(VfioUserCommand.RegionWrite, m => server.Error(m, Errno.EINVAL));
        using var rig = new VfioUserRig(server);
        Assert.That(rig.Io.RegionWrite(VfioPciRegion.Config, 4, [0x47, 0]), Is.EqualTo(Errno.EINVAL));
        Assert.That(rig.Io.RegionRead(VfioPciRegion.Config, 4, new byte[2]), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.LostReason, Is.Null);
    }

    [Test]
    public void C08_DmaIsServedWhileARequestWaits([Values] bool twinSocket)
    {
        (OwnedFd ours, OwnedFd theirs) = Posix.SocketPair();
        OwnedFd? dmaSocket = twinSocket ? ours : null;
        VfioUserMessage? read = null;
        var server = new ScriptedVfioUserServer();
        if (twinSocket)
            server.On(VfioUserCommand.Version, m => server.Reply(m, new VfioUserVersion { MaxMsgFds = 8, TwinSocket = new VfioUserTwinSocket(true, 0) }.ToPayload(), theirs));
        server.On(VfioUserCommand.RegionRead, m =>
        {
            Assert.That(server.Ask(VfioUserCommand.DmaWrite, Dma(0x2ffe, 4, [1, 2, 3, 4]), dmaSocket, m.Header.Id).Header.IsError, Is.False);
            read = server.Ask(VfioUserCommand.DmaRead, Dma(0x2ffd, 6), dmaSocket, m.Header.Id);
            server.Reply(m, [.. m.Body, .. new byte[m.Access.Count]]);
        });
        using (var rig = new VfioUserRig(server))
        {
            Assert.That(rig.Io.Client.HasTwinSocket, Is.EqualTo(twinSocket));
            rig.Io.SetBusMaster(true);
            Assert.That(rig.Io.RegionRead(0, 0, new byte[4]), Is.EqualTo(Errno.None));
            Assert.That(rig.Ram.ReadOnlySlice(0x2ffe, 4).ToArray(), Is.EqualTo((byte[])[1, 2, 3, 4]));
            Assert.That(read!.Body, Is.EqualTo(Dma(0x2ffd, 6, [0, 1, 2, 3, 4, 0])));
        }
        ours.Dispose();
        theirs.Dispose();
    }

    [Test]
    public void C08_RepliesFindTheirRequestsInAnyOrder()
    {
        var held = new List<VfioUserMessage>();
        var server = new ScriptedVfioUserServer();
        server.On(VfioUserCommand.RegionRead, m =>
        {
            held.Add(m);
            if (held.Count < 4) return;
            foreach (VfioUserMessage one in Enumerable.Reverse(held)) server.Reply(one, [.. one.Body, (byte)one.Access.Offset]);
        });
        using var rig = new VfioUserRig(server);
        Task<byte>[] readers = [.. Enumerable.Range(0, 4).Select(i => Task.Factory.StartNew(() =>
        {
            byte[] one = new byte[1];
            return rig.Io.RegionRead(0, (ulong)i * 7, one) == Errno.None ? one[0] : (byte)255;
        }, CancellationToken.None, TaskCreationOptions.LongRunning, TaskScheduler.Default))];
        Assert.That(Task.WaitAll(readers, TimeSpan.FromSeconds(10)));
        Assert.That(readers.Select(static r => r.Result), Is.EqualTo((byte[])[0, 7, 14, 21]));
    }
}
