using System.Buffers.Binary;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Client;
using Vmm.Tests.Support;
using Vmm.Tools.Devices;

namespace Vmm.Tests.Unit.Vfio.User;

/// <summary>Migration data go from socket to socket without a copy in this process.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
internal sealed class VfioUserDirectTests
{
    private const int Chunk = 1 << 20;

    [Test]
    public void WhatIsMovedOutIsTheStateAndWhatIsMovedInIsTakenOver([Values(0, 1, 5_000_000)] int bytes)
    {
        using var from = new Side($"dma-test,seed=1,precopy=off,state-size={(bytes + 4095) / 4096 * 4096}");
        using var to = new Side($"dma-test,seed=2,precopy=off,state-size={(bytes + 4095) / 4096 * 4096}");
        (OwnedFd near, OwnedFd far) = Posix.SocketPair();
        using (near)
        using (far)
        {
            var pieces = new List<int>();
            IVfioDirectData source = from.Open(VfioDeviceState.StopCopy), target = to.Open(VfioDeviceState.Resuming);
            // Announce each piece on the same socket, as the migration stream does with its records.
            Task sending = WorkerThread.Run("out", () => Assert.That(source.MoveOut(near, "pair", n =>
            {
                pieces.Add(n);
                byte[] head = new byte[4];
                BinaryPrimitives.WriteInt32LittleEndian(head, n);
                Posix.Write(near, head, out _);
            }), Is.EqualTo(Errno.None)));
            sending.ContinueWith(_ => Posix.ShutdownSocket(near, Posix.SHUT_WR), TaskScheduler.Default);
            byte[] announced = new byte[4];
            while (Fill(far, announced))
            {
                int n = BinaryPrimitives.ReadInt32LittleEndian(announced);
                // Read a part of the piece ahead, as a buffered reader does.
                byte[] ahead = new byte[Math.Min(n, 100)];
                Fill(far, ahead);
                Assert.That(target.MoveIn(ahead, far, "pair", n), Is.EqualTo(Errno.None));
            }
            sending.GetAwaiter().GetResult();
            Assert.That(target.FinishMoves(), Is.EqualTo(Errno.None));
            Assert.That(pieces, Has.All.LessThanOrEqualTo(Chunk));
            Assert.That(pieces.Sum(), Is.GreaterThan(bytes));
        }
        Assert.That(to.Io.SetMigrationState(VfioDeviceState.Stop, out _), Is.EqualTo(Errno.None), "the device accepts its data as complete");
        Assert.That(to.Read64(DmaTestRegisters.StateChecksum), Is.EqualTo(from.Read64(DmaTestRegisters.StateChecksum)));
        Assert.That(to.Read32(DmaTestRegisters.Loads), Is.EqualTo(1));
    }

    [Test]
    public void ADestinationThatGoesAwayLeavesTheDeviceUsable()
    {
        using var from = new Side("dma-test,seed=1,precopy=off,state-size=32M");
        (OwnedFd near, OwnedFd far) = Posix.SocketPair();
        using (near)
        {
            IVfioDirectData source = from.Open(VfioDeviceState.StopCopy);
            // The peer takes two and a half pieces.
            Task taking = WorkerThread.Run("in", () =>
            {
                using (far) Fill(far, new byte[Chunk * 5 / 2]);
            });
            ChannelException e = Assert.Throws<ChannelException>(() => source.MoveOut(near, "the peer", static _ => { }))!;
            taking.GetAwaiter().GetResult();
            Assert.That(e.Message, Does.Contain("cannot write to the peer"));
        }
        Assert.That(from.Io.SetMigrationState(VfioDeviceState.Running, out _), Is.EqualTo(Errno.None));
        Assert.That(from.Read32(DmaTestRegisters.Id), Is.EqualTo(DmaTestRegisters.IdValue), "requests and replies on the connection are still in step");
    }

    [Test]
    public void ASourceThatGoesAwayInsideAPieceLeavesTheConnectionInStep()
    {
        using var to = new Side("dma-test,seed=2,precopy=off,state-size=32M");
        IVfioDirectData target = to.Open(VfioDeviceState.Resuming);
        (OwnedFd near, OwnedFd far) = Posix.SocketPair();
        using (far)
        {
            Posix.Write(near, new byte[1000], out _);
            near.Dispose();
            Assert.That(Assert.Throws<ChannelException>(() => target.MoveIn([1, 2, 3], far, "the peer", 5000))!.Message, Does.Contain("cannot read from the peer"));
        }
        Assert.That(to.Io.Reset(), Is.EqualTo(Errno.None), "only a reset leaves RESUMING");
        Assert.That(to.Read32(DmaTestRegisters.Id), Is.EqualTo(DmaTestRegisters.IdValue));
    }

    [Test]
    public void ADeviceThatDislikesItsDataSaysSoByTheEndOfTheMoves()
    {
        using var to = new Side("dma-test,seed=2,precopy=off,state-size=4K");
        IVfioDirectData target = to.Open(VfioDeviceState.Resuming);
        (OwnedFd near, OwnedFd far) = Posix.SocketPair();
        using (near)
        using (far)
        {
            Posix.Write(near, new byte[4096], out _);
            Errno first = target.MoveIn([], far, "pair", 4096);
            Assert.That(first != Errno.None ? first : target.FinishMoves(), Is.EqualTo(Errno.EINVAL), "the device refuses zeros as its state");
        }
    }

    [Test]
    public void TowardsAForeignServerMessagesStayWhole()
    {
        using var to = new Side("dma-test,precopy=off", 64 << 10);
        Assert.That(to.Open(VfioDeviceState.StopCopy).CanMove, Is.False);
    }

    private static bool Fill(OwnedFd fd, Span<byte> into)
    {
        while (into.Length > 0)
        {
            int n = Posix.Receive(fd, into, 0, out _);
            if (n <= 0) return false;
            into = into[n..];
        }
        return true;
    }

    private sealed class Side : IDisposable
    {
        private readonly ServedDevice _served;
        private readonly GuestMemory _memory = new();
        private IVfioMigrationData? _data;

        internal Side(string device, int chunkBytes = Chunk)
        {
            _served = new ServedDevice(new DmaTestType().Create(DeviceOptions.Parse(device)));
            _memory.AddBlock(new RamBlockOptions { Name = "ram", SizeBytes = 1 << 20 });
            Io = VfioUserDeviceIo.Open(new VfioUserOptions { SocketPath = "pair", ChunkBytes = chunkBytes }, _memory, _served.ConnectSocket());
        }

        internal VfioUserDeviceIo Io { get; }

        internal IVfioDirectData Open(VfioDeviceState state)
        {
            Assert.That(Io.SetMigrationState(state, out _data), Is.EqualTo(Errno.None));
            return (IVfioDirectData)_data!;
        }

        internal uint Read32(ulong register)
        {
            byte[] bytes = new byte[4];
            Assert.That(Io.RegionRead(0, register, bytes), Is.EqualTo(Errno.None));
            return BinaryPrimitives.ReadUInt32LittleEndian(bytes);
        }

        internal ulong Read64(ulong register) => Read32(register) | ((ulong)Read32(register + 4) << 32);

        public void Dispose()
        {
            _data?.Dispose();
            Io.Dispose();
            _served.Dispose();
            _memory.Dispose();
        }
    }
}
