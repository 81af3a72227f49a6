using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Client;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.ScriptedVfioUserServer;

namespace Vmm.Tests.Fuzz;

/// <summary>
/// A hostile vfio-user server changes bytes of its replies, cuts, pads and doubles them, adds descriptors and sends commands between them.
/// The client must return within its time limit, throw nothing but <see cref="VmmException"/>, and close every descriptor that it received.
/// </summary>
[TestFixture]
public class VfioUserClientFuzz
{
    private const int TimeoutMs = 150;

    [Test]
    public void AHostileServerCannotHangLeakOrCrashTheClient([Range(0, 7)] int seed)
    {
        var random = new Random(seed);
        int attached = 0, refused = 0, lost = 0;
        (OwnedFd read, OwnedFd write) = Posix.Pipe();
        using (read)
        {
            for (int i = 0; i < 40; i++)
            {
                var clock = Stopwatch.StartNew();
                switch (Attack(new Random(random.Next()), write))
                {
                    case null: refused++; break;
                    case true: lost++; break;
                    default: attached++; break;
                }
                // Each request may wait for its whole time limit, but most attacks end at the first request that waits.
                Assert.That(clock.Elapsed, Is.LessThan(TimeSpan.FromSeconds(10)), $"seed {seed}, attack {i}");
            }
            write.Dispose();
            Assert.That(Posix.Poll(read, Posix.POLLIN, null, 30_000, out _) & Posix.POLLHUP, Is.Not.Zero, "a descriptor that the server passed is still open");
        }
        TestContext.Out.WriteLine($"seed {seed}: {attached} lived, {lost} lost, {refused} refused at attach");
        Assert.That(lost + refused, Is.GreaterThan(5));
    }

    /// <returns>Null: the client refused to attach; true: it attached and lost the connection later; false: the connection lives.</returns>
    private static bool? Attack(Random random, OwnedFd gift)
    {
        using var server = new ScriptedVfioUserServer(s => Serve(s, random, gift)) { HasMigration = true, Fragments = random.Next(4) == 0 };
        server.KnowsFeatures(VfioDeviceFeature.Migration, VfioDeviceFeature.MigDeviceState, VfioDeviceFeature.DmaLoggingStart, VfioDeviceFeature.DmaLoggingStop)
            .OnFeature(VfioDeviceFeature.DmaLoggingReport, VfioFeatureOp.Get, m => server.Reply(m, [.. m.Body, .. new byte[32]]))
            .On(VfioUserCommand.MigDataRead, m => server.Reply(m, [.. m.Body, .. new byte[LittleEndian.U32(m.Body, 4)]]))
            .On(VfioUserCommand.MigDataWrite, m => server.Reply(m));
        server.Start();
        using var memory = new GuestMemory();
        RamBlock ram = memory.AddBlock(new RamBlockOptions { Name = "ram", SizeBytes = 1 << 20 });
        try
        {
            using var io = VfioUserDeviceIo.Open(new VfioUserOptions { SocketPath = "hostile", TimeoutMs = TimeoutMs, MigrationTimeoutMs = TimeoutMs }, memory, server.ClientSocket);
            io.SetBusMaster(random.Next(2) == 0);
            Drive(io, ram);
            return io.LostReason is not null;
        }
        catch (VmmException)
        {
            return null;
        }
    }

    /// <summary>Calls each kind of request of <see cref="VfioUserDeviceIo"/>.</summary>
    private static void Drive(VfioUserDeviceIo io, RamBlock ram)
    {
        byte[] data = new byte[5000];
        for (uint i = 0; i < io.Info.RegionCount; i++)
            foreach (VfioRegionArea area in io.GetRegionInfo(i).Areas) io.MapArea(i, area)?.Dispose();
        io.RegionRead(7, 0, data.AsSpan(0, 256));
        io.RegionWrite(0, 8, data, posted: true);
        io.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataNone | VfioIrqSetFlags.ActionTrigger, 0, 0, 0), default, default);
        io.StartDmaLog(4096, [ram.Range], out ulong page);
        io.SetMigrationState(VfioDeviceState.StopCopy, out IVfioMigrationData? saving);
        for (int i = 0; i < 3; i++) saving?.Read(data, out _);
        if (page != 0) io.ReportDmaLog(ram.Range, page, new ulong[4]);
        io.SetMigrationState(VfioDeviceState.Resuming, out IVfioMigrationData? loading);
        loading?.Write(data, out _);
        io.SetMigrationState(VfioDeviceState.Running, out _);
        io.StopDmaLog();
        io.Reset();
        _ = io.Container.GetDirtyBitmap(ram.Range, new ulong[4]);
    }

    private static void Serve(ScriptedVfioUserServer server, Random random, OwnedFd gift)
    {
        while (true)
        {
            VfioUserMessage m = server.Receive();
            if (m.Header.IsReply) continue; // The client replies to a command that Lie sent.
            // Attaching takes about twenty messages, so lies are rare there: most attacks should come later.
            bool attaching = m.Command is VfioUserCommand.Version or VfioUserCommand.DmaMap or VfioUserCommand.DeviceGetInfo or VfioUserCommand.DeviceGetRegionInfo or VfioUserCommand.DeviceGetIrqInfo;
            if (random.Next(attaching ? 40 : 7) > 0) server.Answer(m);
            else Lie(server, random, m, gift);
        }
    }

    private static void Lie(ScriptedVfioUserServer server, Random random, VfioUserMessage m, OwnedFd gift)
    {
        OwnedFd[] gifts = [.. Enumerable.Repeat(gift, random.Next(3) == 0 ? random.Next(17) : 0)];
        byte[] body = new byte[random.Next(4) switch { 0 => 0, 1 => m.Body.Length, 2 => random.Next(200), _ => m.Body.Length + random.Next(64) }];
        if (random.Next(2) == 0) m.Body.AsSpan(0, Math.Min(m.Body.Length, body.Length)).CopyTo(body);
        for (int i = random.Next(5); i > 0 && body.Length > 0; i--) body[random.Next(body.Length)] = (byte)random.Next(256);
        switch (random.Next(9))
        {
            case 0: return; // Send no reply.
            case 1: server.Hangup(); return;
            case 2: server.Error(m, (Errno)random.Next(0, 200)); return;
            case 3: server.Raw(Message((ushort)random.Next(65536), m.Command, VfioUserHeader.Reply, Errno.None, body), gifts); return;
            case 4:
                byte[] whole = Message(m.Header.Id, m.Command, VfioUserHeader.Reply, Errno.None, body);
                whole[random.Next(16)] = (byte)random.Next(256);
                server.Raw(whole, gifts);
                return;
            case 5:
                server.Raw(Message(1, random.Next(3) == 0 ? (VfioUserCommand)random.Next(25) : VfioUserCommand.DmaWrite, 0, Errno.None, Dma((ulong)random.NextInt64(2 << 20), (ulong)body.Length, body)), gifts);
                server.Answer(m);
                return;
            case 6:
                server.Raw(Message(2, VfioUserCommand.DmaRead, 0, Errno.None, Dma((ulong)random.NextInt64(2 << 20), (ulong)random.Next(2 << 20))), gifts);
                server.Answer(m);
                return;
            case 7: server.Raw(Message(m.Header.Id, m.Command, VfioUserHeader.Reply, Errno.None, body)[..random.Next(16 + body.Length)], gifts); return;
            default: server.Reply(m, body, gifts); return;
        }
    }
}
