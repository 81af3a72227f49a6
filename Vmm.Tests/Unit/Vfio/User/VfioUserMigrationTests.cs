using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.ScriptedVfioUserServer;

namespace Vmm.Tests.Unit.Vfio.User;

/// <summary>The client's duties in a migration (vfio-user C-9 to C-15), and where a session begins and ends.</summary>
[TestFixture]
public class VfioUserMigrationTests
{
    /// <summary>A server that enters every requested state, and answers MIG_DATA_READ with these pieces and then with no data.</summary>
    private static ScriptedVfioUserServer Migratable(bool pad = true, params byte[][] pieces)
    {
        int next = 0;
        var server = new ScriptedVfioUserServer { HasMigration = true };
        return server.KnowsFeatures(VfioDeviceFeature.Migration, VfioDeviceFeature.MigDeviceState, VfioDeviceFeature.DmaLoggingStart, VfioDeviceFeature.DmaLoggingStop)
            .On(VfioUserCommand.MigDataRead, m =>
            {
                VfioUserMigData.TryRead(m.Body, out VfioUserMigData ask);
                byte[] data = next < pieces.Length ? pieces[next++] : [];
                byte[] body = new byte[8 + (pad ? (int)ask.Size : data.Length)];
                new VfioUserMigData((uint)(8 + data.Length), (uint)data.Length).Write(body);
                data.CopyTo(body, 8);
                server.Reply(m, body);
            })
            .On(VfioUserCommand.MigDataWrite, m => server.Reply(m));
    }

    private static IVfioMigrationData Enter(VfioUserRig rig, VfioDeviceState state)
    {
        Assert.That(rig.Io.SetMigrationState(state, out IVfioMigrationData? data), Is.EqualTo(Errno.None));
        return data ?? throw new AssertionException($"{state} gave no session");
    }

    private static byte[] ReadAll(IVfioMigrationData data)
    {
        var all = new List<byte>();
        byte[] buffer = new byte[64];
        while (true)
        {
            int n = data.Read(buffer, out Errno errno);
            Assert.That(errno, Is.EqualTo(Errno.None));
            if (n == 0) return [.. all];
            all.AddRange(buffer.AsSpan(0, n));
        }
    }

    [Test]
    public void C09_TrustsTheSizeFieldNotTheMessageSize([Values] bool padded)
    {
        using var rig = new VfioUserRig(Migratable(padded, [1, 2, 3, 4, 5]));
        using IVfioMigrationData data = Enter(rig, VfioDeviceState.StopCopy);
        Assert.That(ReadAll(data), Is.EqualTo((byte[])[1, 2, 3, 4, 5]));
    }

    [TestCase(65u, 64)]
    [TestCase(64u, 32)]
    [TestCase(uint.MaxValue, 64)]
    public void C09_ASizeOverTheRequestOrTheMessageEndsTheConnection(uint said, int sent)
    {
        ScriptedVfioUserServer server = Migratable();
        server.On(VfioUserCommand.MigDataRead, m => server.Reply(m, Bytes(8 + sent, b => new VfioUserMigData(8 + said, said).Write(b))));
        using var rig = new VfioUserRig(server);
        using IVfioMigrationData data = Enter(rig, VfioDeviceState.StopCopy);
        Assert.That((data.Read(new byte[64], out Errno errno), errno), Is.EqualTo((-1, Errno.ENODEV)));
        Assert.That(rig.Io.LostReason, Is.TypeOf<VfioUserProtocolException>());
    }

    [Test]
    public void C10_AShortReadIsNotTheEnd()
    {
        using var rig = new VfioUserRig(Migratable(true, [1], [2, 3], [4]));
        using IVfioMigrationData data = Enter(rig, VfioDeviceState.StopCopy);
        Assert.That(ReadAll(data), Is.EqualTo((byte[])[1, 2, 3, 4]));
        Assert.That((data.Read(new byte[8], out Errno errno), errno), Is.EqualTo((0, Errno.None)), "a read after the end finds the end again");
    }

    [Test]
    public void C11_PrecopyDataAreOneStreamWithTheRestUnlessDiscarded([Values] bool discard)
    {
        using var rig = new VfioUserRig(Migratable(true, [1, 2], [], [3, 4]), o => o with { DiscardPreCopy = discard });
        using IVfioMigrationData data = Enter(rig, VfioDeviceState.PreCopy);
        byte[] buffer = new byte[64];
        Assert.That((data.Read(buffer, out Errno errno), errno), Is.EqualTo(discard ? (0, Errno.ENOMSG) : (2, Errno.None)));
        if (!discard) Assert.That(data.Read(buffer, out _), Is.Zero, "the device has no data at the moment");
        Assert.That(rig.Io.SetMigrationState(VfioDeviceState.StopCopy, out IVfioMigrationData? again), Is.EqualTo(Errno.None));
        Assert.That(again, Is.Null, "the precopy session continues");
        Assert.That(ReadAll(data), Is.EqualTo(discard ? (byte[])[1, 2] : [3, 4]));
    }

    [Test]
    public void C12_TheFinalReportFollowsStopCopyOnTheWire()
    {
        ScriptedVfioUserServer server = Migratable();
        server.OnFeature(VfioDeviceFeature.DmaLoggingReport, VfioFeatureOp.Get, m => server.Reply(m, [.. m.Body, .. new byte[32]]));
        using var rig = new VfioUserRig(server);
        Assert.That(rig.Io.StartDmaLog(4096, [rig.Ram.Range], out ulong inForce), Is.EqualTo(Errno.None));
        Assert.That(inForce, Is.EqualTo(4096));
        using IVfioMigrationData data = Enter(rig, VfioDeviceState.StopCopy);
        Assert.That(rig.Io.ReportDmaLog(rig.Ram.Range, 4096, new ulong[4]), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.StopDmaLog(), Is.EqualTo(Errno.None));
        Assert.That(rig.Server.Received.Where(static m => m.Command == VfioUserCommand.DeviceFeature && m.Feature.Op != VfioFeatureOp.Probe).Select(static m => m.Feature.Feature).Where(static f => f != VfioDeviceFeature.Migration), Is.EqualTo((VfioDeviceFeature[])
            [VfioDeviceFeature.DmaLoggingStart, VfioDeviceFeature.MigDeviceState, VfioDeviceFeature.DmaLoggingReport, VfioDeviceFeature.DmaLoggingStop]));
    }

    [Test]
    public void C13_AServerWithoutMigrationIsABlocker()
    {
        using var rig = new VfioUserRig();
        Assert.That(rig.BlockedReason(), Does.Contain("does not support migration"));
        Assert.That(rig.Io.DeviceFeature(VfioDeviceFeature.Migration, VfioFeatureOp.Get, new byte[8]), Is.EqualTo(Errno.ENOTTY), "the client takes EINVAL for an unknown feature");
    }

    [Test]
    public void C13_DirectWritesThatNobodyLogsAreABlocker([Values] bool logs, [Values] bool sharedRam)
    {
        var server = new ScriptedVfioUserServer { HasMigration = true };
        server.KnowsFeatures(VfioDeviceFeature.Migration).OnFeature(VfioDeviceFeature.Migration, VfioFeatureOp.Get, m => server.Reply(m, [.. m.Body[..8], (byte)VfioMigrationFlags.StopCopy, .. new byte[7]]));
        if (logs) server.KnowsFeatures(VfioDeviceFeature.DmaLoggingStart);
        using var rig = new VfioUserRig(server, shared: sharedRam);
        Assert.That(rig.BlockedReason(), logs || !sharedRam ? Is.Null : Does.Contain("log DMA writes"));
        Assert.That(rig.Io.Container.CanLogDirty, Is.EqualTo(!sharedRam), "the client marks pages that the server writes by message");
        Assert.That(rig.Server.Received.Where(static m => m.Command == VfioUserCommand.DmaMap).Select(static m => m.Fds.Count), Is.EqualTo((int[])[sharedRam ? 1 : 0]));
    }

    [Test]
    public void C14_RegistersAndChunksOfTheV1RegionTravelInOneMessageEach()
    {
        var server = new ScriptedVfioUserServer { HasMigration = true, Regions = 10 };
        server.On(VfioUserCommand.DeviceGetRegionInfo, m =>
        {
            uint index = LittleEndian.U32(m.Body, 8);
            byte[] body = new byte[index == 9 ? 48 : 32];
            new VfioUserRegionInfo((uint)body.Length, index == 9 ? 11u : 0, index, index == 9 ? 32u : 0, index == 9 ? 0x8000ul : 0, 0).Write(body);
            if (index == 9) ((byte[])[2, 0, 1, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0]).CopyTo(body, 32);
            server.Reply(m, body[..(int)Math.Min((uint)body.Length, LittleEndian.U32(m.Body, 0))]);
        });
        using var rig = new VfioUserRig(server);
        VfioRegionInfo info = rig.Io.GetRegionInfo(VfioPciRegion.FirstDeviceSpecific);
        Assert.That((info.Type, info.Subtype, info.SizeBytes), Is.EqualTo((VfioPciRegion.MigrationType, VfioPciRegion.MigrationSubtype, 0x8000)));
        Assert.That(rig.Io.RegionWrite(9, 0, [3, 0, 0, 0], posted: true), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.RegionRead(9, 8, new byte[8]), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.RegionWrite(9, 0x1000, new byte[12296]), Is.EqualTo(Errno.None));
        Assert.That(rig.Server.Received.Where(static m => m.Command is VfioUserCommand.RegionRead or VfioUserCommand.RegionWrite).Select(static m => (m.Access.Offset, m.Access.Count, m.Header.WantsNoReply)),
            Is.EqualTo(((ulong, uint, bool)[])[(0, 4, false), (8, 8, false), (0x1000, 12296, false)]));
        Assert.That(rig.BlockedReason(), Is.Null, "a v1 server logs by DIRTY_PAGES, so it is no blocker");
    }

    [Test]
    public void V1ServersLogByDirtyPages()
    {
        var server = new ScriptedVfioUserServer { HasMigration = true };
        server.On((VfioUserCommand)14, m => server.Reply(m, m.Body[4] == VfioUserDirtyPages.Get ? [.. m.Body, 0x81, .. new byte[31]] : []));
        using var rig = new VfioUserRig(server);
        Assert.That(rig.Io.Container.CanLogDirty);
        Assert.That(rig.Io.Container.MaxDirtyBitmapBytes, Is.EqualTo(256 << 20));
        ulong[] bits = new ulong[4];
        bits[1] = 2;
        Assert.That(rig.Io.Container.StartDirtyLog(), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.Container.GetDirtyBitmap(rig.Ram.Range, bits), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.Container.StopDirtyLog(), Is.EqualTo(Errno.None));
        Assert.That(bits, Is.EqualTo((ulong[])[0x81, 2, 0, 0]));
        Assert.That(rig.Server.Received.Where(static m => (int)m.Command == 14).Select(static m => Convert.ToHexString(m.Body[..8])),
            Is.EqualTo((string[])["0800000001000000", "4800000004000000", "0800000002000000"]));
    }

    [Test]
    public void C15_ReportsAskForThePageSizeOfTheStartOnly()
    {
        ScriptedVfioUserServer server = Migratable();
        server.OnFeature(VfioDeviceFeature.DmaLoggingReport, VfioFeatureOp.Get, m => server.Reply(m, [.. m.Body, .. new byte[32]]));
        using var rig = new VfioUserRig(server);
        Assert.That(rig.Io.ReportDmaLog(rig.Ram.Range, 4096, new ulong[4]), Is.EqualTo(Errno.EINVAL), "the log has not started");
        Assert.That(rig.Io.StartDmaLog(8192, [rig.Ram.Range], out _), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.ReportDmaLog(rig.Ram.Range, 4096, new ulong[4]), Is.EqualTo(Errno.EINVAL));
        Assert.That(rig.Io.ReportDmaLog(rig.Ram.Range, 8192, new ulong[4]), Is.EqualTo(Errno.None));
        Assert.That(rig.Server.Received.Where(static m => m.IsFeature(VfioDeviceFeature.DmaLoggingReport, VfioFeatureOp.Get)).Select(static m => LittleEndian.U64(m.Body, 24)), Is.EqualTo((ulong[])[8192]));
    }

    [Test]
    public void ASessionBeginsWhereSavingOrResumingIsEnteredFromOutside()
    {
        VfioDeviceState[] states = [VfioDeviceState.Stop, VfioDeviceState.Running, VfioDeviceState.StopCopy, VfioDeviceState.Resuming, VfioDeviceState.RunningP2P, VfioDeviceState.PreCopy, VfioDeviceState.PreCopyP2P];
        static bool Saves(VfioDeviceState s) => s is VfioDeviceState.StopCopy or VfioDeviceState.PreCopy or VfioDeviceState.PreCopyP2P;
        using var rig = new VfioUserRig(Migratable());
        foreach (VfioDeviceState from in states)
        {
            foreach (VfioDeviceState to in states)
            {
                rig.Io.SetMigrationState(VfioDeviceState.Running, out _);
                rig.Io.SetMigrationState(from, out IVfioMigrationData? first);
                Assert.That(rig.Io.SetMigrationState(to, out IVfioMigrationData? second), Is.EqualTo(Errno.None));
                bool begins = (Saves(to) && !Saves(from)) || (to == VfioDeviceState.Resuming && from != to);
                Assert.That(second is not null, Is.EqualTo(begins), $"{from} to {to}");
                if (first is null) continue;
                bool lives = Saves(from) ? Saves(to) : to == from;
                int n = Saves(from) ? first.Read(new byte[8], out Errno errno) : first.Write(new byte[8], out errno);
                Assert.That((n >= 0, errno), Is.EqualTo(lives ? (true, Errno.None) : (false, Errno.ENODEV)), $"{from} to {to}: the old session");
            }
        }
    }

    [Test]
    public void ARefusedStateIsAskedForAgain()
    {
        ScriptedVfioUserServer server = Migratable();
        server.OnFeature(VfioDeviceFeature.MigDeviceState, VfioFeatureOp.Set, m =>
        {
            if (m.Body[8] == (byte)VfioDeviceState.StopCopy) server.Error(m, (Errno)0xbeef);
            else server.Reply(m, m.Body);
        }).OnFeature(VfioDeviceFeature.MigDeviceState, VfioFeatureOp.Get, m => server.Reply(m, [.. m.Body, (byte)VfioDeviceState.Stop, 0, 0, 0, 255, 255, 255, 255]));
        using var rig = new VfioUserRig(server);
        using IVfioMigrationData data = Enter(rig, VfioDeviceState.PreCopy);
        Assert.That(rig.Io.SetMigrationState(VfioDeviceState.StopCopy, out IVfioMigrationData? none), Is.EqualTo((Errno)0xbeef), "the client passes the server's errno on");
        Assert.That(none, Is.Null);
        Assert.That(data.Read(new byte[8], out Errno errno), Is.EqualTo(-1), "the device fell back to STOP, which ends the session");
        Assert.That(errno, Is.EqualTo(Errno.ENODEV));
    }

    [Test]
    public void ResetEndsTheSessionAndBringsALaggardBackToRunning()
    {
        ScriptedVfioUserServer server = Migratable();
        byte state = 2;
        server.OnFeature(VfioDeviceFeature.MigDeviceState, VfioFeatureOp.Set, m => server.Reply(m, Bytes(m.Body.Length, b =>
        {
            m.Body.CopyTo(b, 0);
            state = b[8];
        })))
            .OnFeature(VfioDeviceFeature.MigDeviceState, VfioFeatureOp.Get, m => server.Reply(m, [.. m.Body, state, 0, 0, 0, 255, 255, 255, 255]))
            .On(VfioUserCommand.DeviceReset, m =>
            {
                if (state is 1 or 3) server.Error(m, Errno.EINVAL);
                else server.Reply(m);
            });
        using var rig = new VfioUserRig(server);
        foreach (VfioDeviceState from in (VfioDeviceState[])[VfioDeviceState.StopCopy, VfioDeviceState.PreCopy, VfioDeviceState.Resuming])
        {
            using IVfioMigrationData data = Enter(rig, from);
            Assert.That(rig.Io.Reset(), Is.EqualTo(Errno.None), from.ToString());
            Assert.That(state, Is.EqualTo(2), from.ToString());
            Assert.That((data.Read(new byte[8], out Errno errno), errno), Is.EqualTo((-1, Errno.ENODEV)));
        }
    }

    [Test]
    public void WritesAreCutAndPrecopyHasNoFigures()
    {
        using var rig = new VfioUserRig(Migratable());
        using IVfioMigrationData data = Enter(rig, VfioDeviceState.Resuming);
        Assert.That((data.Write(new byte[100_000], out Errno errno), errno), Is.EqualTo((64 << 10, Errno.None)));
        Assert.That((data.Write(new byte[100], out errno), errno), Is.EqualTo((100, Errno.None)));
        Assert.That((data.Read(new byte[100], out errno), errno), Is.EqualTo((-1, Errno.EBADF)));
        Assert.That(data.PrecopyInfo(out _), Is.EqualTo(Errno.ENOTTY));
    }

    [Test]
    public void AServerLeftInStopCopyIsToldToRunAndAttachedThen()
    {
        bool running = false;
        ScriptedVfioUserServer server = Migratable();
        server.OnFeature(VfioDeviceFeature.MigDeviceState, VfioFeatureOp.Set, m =>
        {
            running = m.Body[8] == 2;
            server.Reply(m, m.Body);
        }).On(VfioUserCommand.DmaMap, m =>
        {
            if (running) server.Reply(m);
            else server.Error(m, Errno.EINVAL);
        });
        using var rig = new VfioUserRig(server);
        Assert.That(running);
        Assert.That(rig.Io.Info.RegionCount, Is.EqualTo(9));
    }
}
