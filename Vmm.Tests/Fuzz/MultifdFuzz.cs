using System.Buffers.Binary;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Multifd;
using Vmm.Tests.Support;

namespace Vmm.Tests.Fuzz;

/// <summary>Hostile packets on a multifd channel: each load succeeds or fails with a <see cref="VmmException"/>, and writes to RAM only.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class MultifdFuzz
{
    private const ulong RamBytes = 1 << 20;

    /// <summary>Loads one input.</summary>
    /// <returns>Why the load failed; null when it succeeded.</returns>
    private static Exception? Feed(TestVm vm, ReadOnlySpan<byte> input)
    {
        var latch = new FaultLatch();
        (InMemoryChannel from, InMemoryChannel to) = InMemoryChannel.CreatePair(input.Length + 1);
        using (from)
        {
            var stream = new LoadStream(vm.Vm.SaveVm, new QemuFileReader(new MemoryChannel([])), new LoadContext { HasDataChannels = true });
            stream.LoadSetup();
            using var receiver = new MultifdReceiver([to], MultifdBytes.One, Guid.Empty, latch);
            from.Write(input);
            from.Shutdown(ChannelShutdown.Write);
            receiver.Start(stream);
            try
            {
                // The end of the channel ends this loop with an exception.
                while (true) receiver.WaitSync();
            }
            catch (Exception e) when (e is VmmException or OperationCanceledException)
            {
                return latch.Reason;
            }
        }
    }

    [Test]
    public void AGoodChannelIsLoaded()
    {
        using TestVm vm = TestVm.WithRam(RamBytes, incoming: true);
        Assert.That(Feed(vm, Good(vm)), Is.Null);
        Assert.That(vm.Ram.ReadOnlySlice(3 * 4096, 3 * 4096).ToArray(), Is.All.EqualTo(0x5a));
        Assert.That(vm.Ram.ReadOnlySlice(6 * 4096, 4096).ToArray(), Is.All.Zero);
    }

    [TestCase(0, 0x11223345u, "magic of a multifd packet")]
    [TestCase(4, 2u, "version of a multifd packet")]
    [TestCase(8, 1u, "UUID of a multifd channel")]
    [TestCase(24, 0x01000000u, "id of a multifd channel")]
    [TestCase(64 + 8, 0x80u, "flags of a multifd packet")]
    [TestCase(64 + 1344 + 8, 2u, "compresses pages by 'zlib', this side expects 'none'")]
    [TestCase(64 + 1344 + 8, 0x20u, "compresses pages by '0x20', this side expects 'none'")]
    [TestCase(64 + 1344, 0u, "magic of a multifd packet")]
    [TestCase(64 + 1344 + 16, 129u, "pages of a multifd packet")]
    [TestCase(64 + 1344 + 32, 126u, "pages of a multifd packet")]
    [TestCase(64 + 1344 + 64, 0x78787878u, "RAM block")]
    [TestCase(64 + 1344 + 324, 0x1001u, "page offset in RAM block 'm'")]
    [TestCase(64 + 1344 + 324, 0x100000u, "page offset in RAM block 'm'")]
    public void ABadWordIsNamed(int at, uint value, string named)
    {
        using TestVm vm = TestVm.WithRam(RamBytes, incoming: true);
        byte[] bytes = Good(vm);
        BinaryPrimitives.WriteUInt32BigEndian(bytes.AsSpan(at), value);
        Assert.That(Feed(vm, bytes)?.Message, Does.Contain(named));
    }

    [Test]
    public void DeviceStateForNobodyIsNamed()
    {
        using TestVm vm = TestVm.WithRam(RamBytes, incoming: true);
        byte[] state = [.. MultifdPacket.Preamble(Guid.Empty, 0), .. MultifdBytes.State("0000:00:02.0/vfio", 0, 3), 1, 2, 3];
        Assert.That(Feed(vm, state)?.Message, Does.Contain("'0000:00:02.0/vfio' instance 0"));
        BinaryPrimitives.WriteUInt32BigEndian(state.AsSpan(64 + 272), 0x7fffffff);
        Assert.That(Feed(vm, state), Is.InstanceOf<StreamLimitException>());
        BinaryPrimitives.WriteUInt32BigEndian(state.AsSpan(64 + 272), 0);
        Assert.That(Feed(vm, state)?.Message, Does.Contain("length of device state"));
    }

    [Test]
    public void EveryCutEnds()
    {
        using TestVm vm = TestVm.WithRam(RamBytes, incoming: true);
        byte[] bytes = Good(vm);
        int packet = 64 + 1344;
        foreach (int length in Enumerable.Range(0, 40).Concat([63, 64, 65, 64 + 11, packet - 1, packet, packet + 1, packet + 1343, packet + 1344, packet + 1345, bytes.Length - 1]))
            Assert.That(Feed(vm, bytes.AsSpan(0, length)), length is 64 or (64 + 1344) ? Is.Null : Is.InstanceOf<StreamTruncatedException>(), $"{length} bytes");
    }

    [Test]
    public void DamagedPacketsNeverEscape([Range(1, 4)] int seed)
    {
        using TestVm vm = TestVm.WithRam(RamBytes, incoming: true);
        byte[] good = Good(vm);
        var random = new Random(seed);
        for (int round = 0; round < 150; round++)
        {
            byte[] bytes = [.. good];
            // Change headers, because changed pages are legal.
            for (int i = random.Next(1, 6); i > 0; i--) bytes[random.Next(64 + 1344 + 64 + 260 + 80)] ^= (byte)(1 << random.Next(8));
            Assert.That(Feed(vm, bytes), Is.Null.Or.InstanceOf<VmmException>());
        }
    }

    /// <summary>A valid channel: preamble, SYNC, a packet of three pages, SYNC.</summary>
    private static byte[] Good(TestVm vm)
    {
        byte[] pages = new byte[3 * 4096];
        pages.AsSpan().Fill(0x5a);
        return [.. MultifdPacket.Preamble(Guid.Empty, 0), .. MultifdBytes.Sync(0), .. MultifdBytes.Pages(vm.Ram, [3, 4, 5], 1), .. pages, .. MultifdBytes.Sync(2)];
    }
}
