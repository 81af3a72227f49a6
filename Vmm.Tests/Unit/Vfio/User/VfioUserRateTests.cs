using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Client;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.User;

/// <summary>Compares the rate of device state from one server through two clients to another with plain copies over the same kind of sockets.</summary>
[TestFixture]
[NonParallelizable]
public class VfioUserRateTests
{
    private const int ChunkBytes = 1 << 20;
    private const long StateBytes = 512L << 20;

    [Test]
    public void DeviceStateTravelsAtHalfThePlainCopyRateAtLeastAndInBoundedMemory()
    {
        double plain = 0, state = 0;
        long grown = 0;
        // Take the best of each, because other work on the machine can only slow them down; a busier machine needs more rounds.
        for (int i = 0; i < 3 || (i < 12 && state <= plain / 2); i++)
        {
            plain = Math.Max(plain, PlainRate());
            state = Math.Max(state, StateRate(ref grown));
        }
        TestContext.Out.WriteLine($"plain {plain:F0} MB/s, device state {state:F0} MB/s, managed heap grew by {grown >> 10} KiB");
        Assert.That(state, Is.GreaterThan(plain / 2));
        Assert.That(grown, Is.LessThan(16 << 20));
    }

    /// <summary>Copies bytes over two socket pairs, the same path as the state's but without a protocol.</summary>
    private static double PlainRate()
    {
        (OwnedFd a, OwnedFd b) = Posix.SocketPair();
        (OwnedFd c, OwnedFd d) = Posix.SocketPair();
        var clock = Stopwatch.StartNew();
        Task source = WorkerThread.Run("test/source", () => Pump(null, a));
        Task middle = WorkerThread.Run("test/middle", () => Pump(b, c));
        Pump(d, null);
        clock.Stop();
        Task.WaitAll(source, middle);
        foreach (OwnedFd fd in (OwnedFd[])[a, b, c, d]) fd.Dispose();
        return StateBytes / 1e6 / clock.Elapsed.TotalSeconds;
    }

    private static void Pump(OwnedFd? from, OwnedFd? to)
    {
        byte[] buffer = new byte[ChunkBytes];
        for (long left = StateBytes; left > 0;)
        {
            int n = from is null ? buffer.Length : Posix.Receive(from, buffer, 0, out _);
            for (int at = 0; to is not null && at < n;) at += Posix.SendWithFds(to, buffer.AsSpan(at, n - at), default, out _);
            left -= n;
        }
    }

    private static double StateRate(ref long grown)
    {
        using var source = new StateServer();
        using var sink = new StateServer();
        VfioUserOptions options = new() { SocketPath = "rate", ChunkBytes = ChunkBytes };
        using var memory = new Vmm.Core.Memory.GuestMemory();
        using var from = VfioUserDeviceIo.Open(options, memory, source.Scripted.ClientSocket);
        using var to = VfioUserDeviceIo.Open(options, memory, sink.Scripted.ClientSocket);
        Assert.That(from.SetMigrationState(VfioDeviceState.StopCopy, out IVfioMigrationData? save), Is.EqualTo(Errno.None));
        Assert.That(to.SetMigrationState(VfioDeviceState.Resuming, out IVfioMigrationData? load), Is.EqualTo(Errno.None));
        byte[] buffer = new byte[ChunkBytes];
        long before = GC.GetTotalMemory(forceFullCollection: true);
        var clock = Stopwatch.StartNew();
        long total = 0;
        while (true)
        {
            int n = save!.Read(buffer, out Errno errno);
            Assert.That(errno, Is.EqualTo(Errno.None));
            if (n == 0) break;
            for (int at = 0; at < n;) at += load!.Write(buffer.AsSpan(at, n - at), out _);
            total += n;
        }
        clock.Stop();
        grown = Math.Max(grown, GC.GetTotalMemory(forceFullCollection: false) - before);
        Assert.That(total, Is.EqualTo(StateBytes));
        return StateBytes / 1e6 / clock.Elapsed.TotalSeconds;
    }

    /// <summary>A server that gives and takes state without allocating.</summary>
    private sealed class StateServer : IDisposable
    {
        private readonly byte[] _body = new byte[8 + ChunkBytes];
        private readonly byte[] _reply = new byte[24 + ChunkBytes];
        private long _left = StateBytes;

        internal StateServer()
        {
            Scripted = new ScriptedVfioUserServer { HasMigration = true };
            Scripted.KnowsFeatures(VfioDeviceFeature.MigDeviceState).OnFeature(VfioDeviceFeature.MigDeviceState, VfioFeatureOp.Set, m =>
            {
                Scripted.Reply(m, m.Body);
                Serve();
            });
            Scripted.Start();
        }

        internal ScriptedVfioUserServer Scripted { get; }

        public void Dispose() => Scripted.Dispose();

        private void Serve()
        {
            while (true)
            {
                VfioUserHeader header = Scripted.ReceiveInto(_body);
                bool read = header.Command == VfioUserCommand.MigDataRead;
                int n = read ? (int)Math.Min(_left, LittleEndian.U32(_body, 4)) : 0;
                _left -= n;
                int length = read ? 24 + n : 16;
                new VfioUserHeader(header.Id, header.Command, (uint)length, VfioUserHeader.Reply, Errno.None).Write(_reply);
                if (read) new VfioUserMigData((uint)(8 + n), (uint)n).Write(_reply.AsSpan(16));
                Scripted.Raw(_reply.AsSpan(0, length));
            }
        }
    }
}
