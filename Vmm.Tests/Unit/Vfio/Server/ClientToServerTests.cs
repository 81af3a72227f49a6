using System.Buffers.Binary;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Client;
using Vmm.Tests.Support;
using Vmm.Tools.Devices;
using static Vmm.Tools.Devices.DmaTestRegisters;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>Our client on our server moves a busy device's state, and every page that the device wrote.</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
internal sealed class ClientToServerTests
{
    private const ulong RamBytes = 1 << 20, Slots = 64, BlockBytes = 4096, Address = 0x8_0000;

    [Test]
    public void ABusyDeviceMovesWithItsStateAndMemoryAfterThreeCancels([Values(true, false)] bool sharedRam, [Values("", ",precopy=off", ",p2p=on")] string options)
    {
        using var source = new Side("dma-test,seed=1,state-size=2M" + options, sharedRam);
        using var target = new Side("dma-test,seed=2,state-size=2M" + options, sharedRam);
        source.StartEngine();
        for (int i = 0; i < 3; i++)
        {
            Assert.That(source.Io.SetMigrationState(i == 0 ? VfioDeviceState.StopCopy : VfioDeviceState.RunningP2P, out IVfioMigrationData? data) is Errno.None or Errno.EINVAL);
            data?.Read(new byte[1000], out _);
            Assert.That(source.Io.SetMigrationState(VfioDeviceState.Running, out _), Is.EqualTo(Errno.None));
            source.WaitForBlocks(3);
        }
        Assert.That(source.Io.StartDmaLog(4096, [new GuestRange(new GuestAddress(0), RamBytes)], out _), Is.EqualTo(Errno.None));
        target.CopyRam(source, null);
        byte[] stream = source.Save(hasPrecopy: !options.Contains("precopy=off", StringComparison.Ordinal), out ulong[] dirty);
        ulong next = source.Read64(Sequence);
        // Without descriptors every DMA write passes the client, and the client's own tests check that it marks them; so copy all RAM.
        target.CopyRam(source, sharedRam ? dirty : null);
        target.Load(stream);
        Assert.That((target.Read64(Sequence), target.Read64(StateChecksum)), Is.EqualTo((next, source.Read64(StateChecksum))));
        target.AssertMemory(next);
        Assert.That(target.Io.SetMigrationState(VfioDeviceState.Running, out _), Is.EqualTo(Errno.None));
        target.WaitForBlocks(Slots);
        Assert.That(target.Io.SetMigrationState(VfioDeviceState.Stop, out _), Is.EqualTo(Errno.None));
        target.AssertMemory(target.Read64(Sequence));
    }

    /// <summary>A <see cref="VfioUserSide"/> with a dma-test device.</summary>
    private sealed class Side(string device, bool sharedRam) : IDisposable
    {
        private readonly VfioUserSide _side = new(new ServedDevice(new DmaTestType().Create(DeviceOptions.Parse(device))), sharedRam, RamBytes);

        internal VfioUserDeviceIo Io => _side.Io;

        internal void StartEngine()
        {
            _side.Write(VfioPciRegion.Config, 4, [6, 0]);
            Write64(Base, Address);
            Write64(Length, Slots * BlockBytes);
            Write64(Rate, 20 << 20);
            _side.Write(0, Control, [1, 0, 0, 0]);
            WaitForBlocks(5);
        }

        internal ulong Read64(ulong register)
        {
            byte[] bytes = new byte[8];
            Assert.That(Io.RegionRead(0, register, bytes), Is.EqualTo(Errno.None));
            return BinaryPrimitives.ReadUInt64LittleEndian(bytes);
        }

        internal void WaitForBlocks(ulong more)
        {
            ulong until = Read64(Sequence) + more;
            LeakCheck.WaitFor(() => Read64(Sequence) >= until, "the engine does not write");
        }

        internal byte[] Save(bool hasPrecopy, out ulong[] dirty)
        {
            var stream = new List<byte>();
            byte[] buffer = new byte[60_000];
            IVfioMigrationData? data = null;
            if (hasPrecopy)
            {
                Assert.That(Io.SetMigrationState(VfioDeviceState.PreCopy, out data), Is.EqualTo(Errno.None));
                for (int i = 0; i < 20; i++)
                {
                    stream.AddRange(buffer.AsSpan(0, data!.Read(buffer, out _)));
                    _side.Report();
                }
            }
            stream.AddRange(_side.SaveStopped(data));
            dirty = _side.Dirty;
            return [.. stream];
        }

        internal void Load(ReadOnlySpan<byte> stream) => _side.Load(stream);

        internal void CopyRam(Side from, ulong[]? dirty) => _side.CopyRam(from._side, dirty);

        internal void AssertMemory(ulong next)
        {
            byte[] expected = new byte[BlockBytes];
            for (ulong slot = 0; slot < Slots; slot++)
            {
                long last = DmaTestPattern.LastOf(slot, Slots, next);
                if (last < 0) continue;
                DmaTestPattern.Fill((ulong)last, expected);
                Assert.That(_side.ReadPage(Address + (slot * BlockBytes)), Is.EqualTo(expected), $"slot {slot}, block {last} of {next}");
            }
        }

        public void Dispose() => _side.Dispose();

        private void Write64(ulong register, ulong value) => _side.Write(0, register, BitConverter.GetBytes(value));
    }
}
