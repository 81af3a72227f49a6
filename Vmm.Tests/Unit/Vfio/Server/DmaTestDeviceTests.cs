using System.Buffers.Binary;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Support;
using Vmm.Tools.Devices;
using static Vmm.Tests.Support.RawVfioUserClient;
using static Vmm.Tools.Devices.DmaTestRegisters;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>The served test device runs its DMA engine, and its state moves from one server to another.</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
internal sealed class DmaTestDeviceTests
{
    private const ulong Slots = 64, BlockBytes = 4096, Address = 0x10_0000;

    private static ServedDevice Serve(string options = "", VfioUserServerOptions? server = null) =>
        new(new DmaTestType().Create(DeviceOptions.Parse("dma-test" + (options.Length > 0 ? "," + options : ""))), server);

    private static void StartEngine(RawVfioUserClient client, ulong rate = 0)
    {
        PrepareEngine(client, rate);
        client.RegionWrite(0, Control, ControlRun);
    }

    private static void PrepareEngine(RawVfioUserClient client, ulong rate)
    {
        client.RegionWrite(7, 4, (ushort)6);
        client.RegionWrite(0, Base, Address);
        client.RegionWrite(0, Length, Slots * BlockBytes);
        client.RegionWrite(0, Rate, rate);
    }

    private static void WaitForSequence(RawVfioUserClient client, ulong atLeast) =>
        LeakCheck.WaitFor(() => client.Read64(0, Sequence) >= atLeast, "the engine does not write");

    /// <summary>Checks that every slot holds the last block that the engine wrote to it.</summary>
    private static void AssertMemory(VfioUserMemory ram, ulong next)
    {
        byte[] expected = new byte[BlockBytes];
        for (ulong slot = 0; slot < Slots; slot++)
        {
            long last = DmaTestPattern.LastOf(slot, Slots, next);
            expected.AsSpan().Clear();
            if (last >= 0) DmaTestPattern.Fill((ulong)last, expected);
            Assert.That(ram.Slice(slot * BlockBytes, (int)BlockBytes).SequenceEqual(expected), $"slot {slot}, block {last} of {next}");
        }
    }

    private static VfioUserMemory Ram() => new("guest", Slots * BlockBytes);

    [Test]
    public void ItLooksLikeAPciFunction()
    {
        using ServedDevice served = Serve();
        using RawVfioUserClient client = served.Attach();
        Assert.That(client.Read32(7, 0), Is.EqualTo(VendorId | ((uint)DeviceId << 16)));
        client.RegionWrite(7, 0x10, uint.MaxValue);
        Assert.That(client.Read32(7, 0x10), Is.EqualTo(0xfffff000u), "sizing");
        client.RegionWrite(7, 0x18, uint.MaxValue);
        Assert.That(client.Read32(7, 0x18), Is.EqualTo(0xffffc000u));
        client.RegionWrite(7, 0x1c, uint.MaxValue);
        client.RegionWrite(7, 0x30, uint.MaxValue);
        Assert.That((client.Read32(7, 0x1c), client.Read32(7, 0x20), client.Read32(7, 0x30)), Is.EqualTo((0xfffffff9u, 0u, 0u)), "BAR3 has eight ports; no BAR4, no ROM");
        client.RegionWrite(7, 0, 0u);
        Assert.That(client.Read32(7, 0), Is.Not.Zero, "ids are read-only");
        byte at = client.RegionRead(7, 0x34, 1)[0];
        Assert.That((client.RegionRead(7, at, 2), client.RegionRead(7, at + 2UL, 2)[0], client.RegionRead(7, 6, 1)[0] & 0x10), Is.EqualTo((new byte[] { 0x11, 0 }, (byte)3, 0x10)));
        Assert.That(client.Read32(0, Id), Is.EqualTo(IdValue));
    }

    [Test]
    public void ItsEngineWritesNumberedBlocksAndInterrupts()
    {
        using ServedDevice served = Serve();
        using RawVfioUserClient client = served.Attach();
        using VfioUserMemory ram = Ram();
        using OwnedFd vector = Posix.EventFd();
        client.Map(Address, ram.SizeBytes, ram.Fd);
        client.RegionWrite(7, 0x42, (ushort)0x8000);
        client.SetIrqs(0x24, 2, 0, 1, vector);
        client.RegionWrite(0, InterruptEvery, 10u);
        StartEngine(client);
        WaitSignalled(vector);
        WaitForSequence(client, 3 * Slots);
        client.RegionWrite(0, Control, 0u);
        client.SetState(VfioDeviceState.Stop);
        ulong next = client.Read64(0, Sequence);
        AssertMemory(ram, next);
        Assert.That(client.Read64(0, Interrupts), Is.EqualTo(next / 10));
    }

    [Test]
    public void WithoutMemoryItWaitsAndGoesOn()
    {
        using ServedDevice served = Serve();
        using RawVfioUserClient client = served.Attach();
        using VfioUserMemory ram = Ram();
        StartEngine(client);
        LeakCheck.WaitFor(() => (client.Read32(0, Status) & StatusStalled) != 0, "the engine did not stall");
        client.Map(Address, ram.SizeBytes, ram.Fd);
        WaitForSequence(client, 5);
        client.HangUp();
        using RawVfioUserClient next = served.Attach();
        ulong before = next.Read64(0, Sequence);
        next.Map(Address, ram.SizeBytes, ram.Fd);
        WaitForSequence(next, before + 5);
        Assert.That(next.Read32(0, Status) & StatusError, Is.Zero);
    }

    [Test]
    public void S37_S41_StateAndEveryPageArriveWithPrecopyConcatenatedOrDropped([Values(true, false)] bool dropsPrecopy, [Values("precopy=on", "precopy=off", "precopy=on,p2p=on")] string options)
    {
        using ServedDevice source = Serve(options + ",state-size=3M,seed=7"), target = Serve(options + ",state-size=3M,seed=8");
        using RawVfioUserClient from = source.Attach(), to = target.Attach();
        using VfioUserMemory ram = Ram(), copy = Ram();
        using OwnedFd vector = Posix.EventFd();
        from.Map(Address, ram.SizeBytes, ram.Fd);
        to.Map(Address, copy.SizeBytes, copy.Fd);
        to.SetIrqs(0x24, 2, 0, 1, vector);
        from.RegionWrite(0, Scratch + 8, 0xdeadbeefUL);
        from.RegionWrite(2, 0x3000, 0x1234u);
        ulong checksum = from.Read64(0, StateChecksum);
        Assert.That(to.Read64(0, StateChecksum), Is.Not.EqualTo(checksum));
        from.StartLog();
        StartEngine(from);
        WaitForSequence(from, 10);
        var dirty = new HashSet<int>();
        var stream = new List<byte>();
        // Copy the pages written before the log started, as the first RAM pass does.
        ram.Slice(0, (int)ram.SizeBytes).CopyTo(copy.Slice(0, (int)ram.SizeBytes));
        if (options.Contains("precopy=on"))
        {
            from.SetState(VfioDeviceState.PreCopy);
            for (int i = 0; i < 20; i++)
            {
                byte[] part = from.MigRead(65536);
                if (!dropsPrecopy) stream.AddRange(part);
                dirty.UnionWith(from.Report(Address, ram.SizeBytes));
            }
            if (options.Contains("p2p=on")) from.SetState(VfioDeviceState.PreCopyP2P);
        }
        from.SetState(VfioDeviceState.StopCopy);
        stream.AddRange(from.MigReadAll(65536));
        dirty.UnionWith(from.Report(Address, ram.SizeBytes));
        foreach (int page in dirty) ram.Slice((ulong)page * 4096, 4096).CopyTo(copy.Slice((ulong)page * 4096, 4096));
        ulong next = from.Read64(0, Sequence);
        from.SetState(VfioDeviceState.Stop);

        to.SetState(VfioDeviceState.Resuming);
        byte[] all = [.. stream];
        for (int at = 0; at < all.Length; at += 50_001) to.MigWrite(all.AsSpan(at, Math.Min(50_001, all.Length - at)));
        to.SetState(VfioDeviceState.Stop);
        Assert.That((to.Read64(0, StateChecksum), to.Read64(0, Sequence), to.Read32(0, Loads)), Is.EqualTo((checksum, next, 1u)));
        Assert.That((to.Read64(0, Scratch + 8), to.Read32(2, 0x3000), to.RegionRead(7, 4, 2)[0]), Is.EqualTo((0xdeadbeefUL, 0x1234u, (byte)6)));
        AssertMemory(copy, next);
        to.SetState(VfioDeviceState.Running);
        WaitForSequence(to, next + 2 * Slots);
        to.SetState(VfioDeviceState.Stop);
        AssertMemory(copy, to.Read64(0, Sequence));
        Assert.That(from.Read64(0, Sequence), Is.EqualTo(next), "the source stays stopped");
    }

    [Test]
    public void S45_StateOfManyChunksArrivesWhateverTheChunk([Values(4096, 65536, 100_000, 1 << 20)] int chunk)
    {
        const string options = "state-size=33M,seed=";
        using ServedDevice source = Serve(options + "1"), target = Serve(options + "2");
        using RawVfioUserClient from = source.Attach(), to = target.Attach();
        from.SetState(VfioDeviceState.StopCopy);
        to.SetState(VfioDeviceState.Resuming);
        for (byte[] part = from.MigRead(chunk); part.Length > 0; part = from.MigRead(chunk)) to.MigWrite(part);
        to.SetState(VfioDeviceState.Stop);
        Assert.That(to.Read64(0, StateChecksum), Is.EqualTo(from.Read64(0, StateChecksum)));
    }

    [Test]
    public void S50_AfterACancelTheEngineGoesOnAndTheNextAttemptIsWhole()
    {
        using ServedDevice served = Serve("state-size=100K");
        using RawVfioUserClient client = served.Attach();
        using VfioUserMemory ram = Ram();
        client.Map(Address, ram.SizeBytes, ram.Fd);
        StartEngine(client);
        byte[]? size = null;
        for (int i = 0; i < 3; i++)
        {
            client.SetState(VfioDeviceState.PreCopy);
            client.MigRead(1000);
            client.SetState(VfioDeviceState.StopCopy);
            byte[] state = client.MigReadAll();
            size ??= state;
            Assert.That(state, Has.Length.EqualTo(size.Length));
            client.SetState(VfioDeviceState.Running);
            WaitForSequence(client, client.Read64(0, Sequence) + 5);
        }
    }

    [Test]
    public void QuiesceWaitsForDmaByMessageAndMigrationGoesOn()
    {
        using ServedDevice served = Serve();
        using RawVfioUserClient client = served.Attach();
        client.Map(Address, Slots * BlockBytes, null);
        PrepareEngine(client, 0);
        client.Send(VfioUserCommand.RegionWrite, Bytes(Control, 0u, 4, ControlRun), flags: VfioUserHeader.NoReply);
        // The engine's DMA request is under way when the client asks for the stop, so the server answers the stop only after that request's reply.
        VfioUserReply request = NextDma(client);
        client.Send(VfioUserCommand.DeviceFeature, StateRequest(VfioDeviceState.StopCopy), id: 1);
        client.Send(VfioUserCommand.DmaWrite, [], flags: 1, id: request.Header.Id);
        for (VfioUserReply reply = client.Receive(); ; reply = client.Receive())
        {
            if (reply.Header.IsReply)
            {
                Assert.That((reply.Header.Id, reply.Header.Errno), Is.EqualTo(((ushort)1, Errno.None)));
                break;
            }
            client.Send(VfioUserCommand.DmaWrite, [], flags: 1, id: reply.Header.Id);
        }
        Assert.That(client.MigReadAll(), Is.Not.Empty);
    }

    private static VfioUserReply NextDma(RawVfioUserClient client)
    {
        VfioUserReply message = client.Receive();
        Assert.That(message.Header.IsCommand);
        return message;
    }

    private static byte[] StreamOf(string options)
    {
        using ServedDevice served = Serve(options);
        using RawVfioUserClient client = served.Attach();
        client.SetState(VfioDeviceState.StopCopy);
        return client.MigReadAll(65536);
    }

    private static Errno Load(byte[] stream, string options)
    {
        using ServedDevice served = Serve(options);
        using RawVfioUserClient client = served.Attach();
        client.SetState(VfioDeviceState.Resuming);
        using (VfioUserReply write = client.Ask(VfioUserCommand.MigDataWrite, Bytes(8 + stream.Length, stream.Length, stream)))
            if (write.Header.Errno != Errno.None) return write.Header.Errno;
        using VfioUserReply stop = client.Ask(VfioUserCommand.DeviceFeature, StateRequest(VfioDeviceState.Stop));
        if (stop.Header.Errno != Errno.None)
        {
            Assert.That(client.State, Is.EqualTo(VfioDeviceState.Resuming));
            client.Ok(VfioUserCommand.DeviceReset, []);
            Assert.That(client.Read32(0, Loads), Is.Zero);
        }
        return stop.Header.Errno;
    }

    [Test]
    public void S41_EveryProperPrefixAndEveryFlippedByteFails()
    {
        byte[] stream = StreamOf("state-size=100");
        Assert.That(Load(stream, "state-size=100"), Is.EqualTo(Errno.None));
        for (int n = 0; n < stream.Length; n += 1 + (n / 8)) Assert.That(Load(stream[..n], "state-size=100"), Is.EqualTo(Errno.EINVAL), $"prefix of {n}");
        for (int at = 0; at < stream.Length; at += 1 + (at / 8))
        {
            byte[] bad = [.. stream];
            bad[at] ^= 0x10;
            Assert.That(Load(bad, "state-size=100"), Is.EqualTo(Errno.EINVAL).Or.EqualTo(Errno.EFBIG), $"byte {at}");
        }
        Assert.That(Load([.. stream, 0], "state-size=100"), Is.EqualTo(Errno.EINVAL), "bytes behind the end of the state");
    }

    [Test]
    public void S41_AnotherTypeVersionOrSizeIsRefusedAtTheWriteThatShowsIt()
    {
        byte[] stream = StreamOf("state-size=100");
        byte[] type = [.. stream], version = [.. stream];
        type[32]++;
        version[4] = 2;
        Assert.That((Load(type, "state-size=100"), Load(version, "state-size=100"), Load(stream, "state-size=101")), Is.EqualTo((Errno.EINVAL, Errno.EINVAL, Errno.EINVAL)));
        Assert.That(Load(StreamOf("state-size=200"), "state-size=100"), Is.EqualTo(Errno.EFBIG), "vfio-user S-56");
        BinaryPrimitives.WriteUInt64LittleEndian(stream.AsSpan(40 + 8), ulong.MaxValue);
        Assert.That(Load(stream, "state-size=100"), Is.EqualTo(Errno.EFBIG));
    }

    [TestCase("stop-copy", VfioDeviceState.StopCopy, VfioDeviceState.Stop)]
    [TestCase("pre-copy", VfioDeviceState.PreCopy, VfioDeviceState.Running)]
    [TestCase("resuming", VfioDeviceState.Resuming, VfioDeviceState.Stop)]
    [TestCase("stop", VfioDeviceState.StopCopy, VfioDeviceState.Running)]
    public void AFailureAskedForHappensOnce(string fail, VfioDeviceState target, VfioDeviceState stays)
    {
        using ServedDevice served = Serve("fail=" + fail);
        using RawVfioUserClient client = served.Attach();
        client.Fails(Errno.EIO, VfioUserCommand.DeviceFeature, StateRequest(target));
        Assert.That(client.State, Is.EqualTo(stays));
        client.SetState(target);
    }

    [Test]
    public void AFailingCommitLeavesADeviceThatAResetMends()
    {
        Assert.That(Load(StreamOf("state-size=1000"), "state-size=1000,fail=commit"), Is.EqualTo(Errno.EIO));
    }

    [Test]
    public void S51_S58_DevicesOfOneProcessDoNotKnowEachOther()
    {
        using ServedDevice one = Serve("seed=1,state-size=10"), two = Serve("seed=2,state-size=10");
        using RawVfioUserClient a = one.Attach(), b = two.Attach();
        a.SetState(VfioDeviceState.StopCopy);
        Assert.That(b.State, Is.EqualTo(VfioDeviceState.Running));
        b.SetState(VfioDeviceState.PreCopy);
        a.SetState(VfioDeviceState.Running);
        Assert.That((a.State, b.State), Is.EqualTo((VfioDeviceState.Running, VfioDeviceState.PreCopy)));
    }

    [Test]
    public void OptionsThatMakeNoSenseAreRefused()
    {
        foreach (string text in (string[])["fail=nowhere", "state-size=65G", "bogus=1", "precopy=maybe", "slow-ms=60001"])
            Assert.That(() => new DmaTestType().Create(DeviceOptions.Parse("dma-test," + text)), Throws.TypeOf<ConfigurationException>(), text);
    }
}
