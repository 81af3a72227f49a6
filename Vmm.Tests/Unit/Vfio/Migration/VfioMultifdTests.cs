using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Migration;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Migration;

/// <summary>The final state moves over data channels; packets arrive in any order, and the device loads them by index (vfio-migration 3.7).</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class VfioMultifdTests
{
    [Test]
    public void PacketsInAnyOrderGiveTheStateInOrder([Range(1, 8)] int seed)
    {
        using var pair = new Side(incoming: false, new FakeVfioDevice("a", VfioMigrationFlags.StopCopy) { State = VfioMigrationTests.Bytes(3_500_000, seed), MaxTransfer = 300_000 });
        pair.Device.Config.Bytes[7] = 0x42;
        List<byte[]> packets = pair.SavePackets(out byte[] main);
        Assert.That(packets, Has.Count.EqualTo(13));
        Assert.That(packets[^1].AsSpan(0, 12).SequenceEqual((byte[])[0, 0, 0, 0, 0, 0, 0, 12, 0, 0, 0, 1]), "version 0, idx 12, CONFIG_STATE");
        Assert.That(main.AsSpan(5, 8).ToArray(), Is.EqualTo((byte[])[0xff, 0xff, 0xff, 0xff, 0xef, 0x10, 0, 1]), "the END section has END_OF_STATE only");
        new Random(seed).Shuffle(System.Runtime.InteropServices.CollectionsMarshal.AsSpan(packets));
        using var to = new Side(incoming: true, new FakeVfioDevice("b", VfioMigrationFlags.StopCopy));
        to.BeginLoad();
        // Five packets come before the switchover command, the others after it on four threads.
        foreach (byte[] packet in packets[..5]) to.Buffers.LoadStateBuffer(Owned(packet));
        using (to.Vm.Vm.Bql.Acquire()) to.Buffers.SwitchoverStart();
        Parallel.ForEach(packets[5..], new ParallelOptions { MaxDegreeOfParallelism = 4 }, p => to.Buffers.LoadStateBuffer(Owned(p)));
        to.Buffers.WaitLoaded(CancellationToken.None);
        to.EndLoad();
        Assert.That(to.Device.Io.State, Is.EqualTo(pair.Device.Io.State));
        Assert.That(to.Device.Config.Bytes[7], Is.EqualTo(0x42));
        Assert.That((to.Device.State, to.Device.Io.OpenSessions), Is.EqualTo((VfioDeviceState.Stop, 0)));
    }

    [TestCase(1u, 0u, 0u, "version 1")]
    [TestCase(0u, uint.MaxValue, 0u, "index 4294967295")]
    [TestCase(0u, 1u, 2u, "unknown flags 0x2")]
    public void ABadHeaderIsRefused(uint version, uint index, uint flags, string named)
    {
        using var to = new Side(incoming: true, new FakeVfioDevice("b", VfioMigrationFlags.StopCopy));
        to.BeginLoad();
        Assert.That(Assert.Throws<StreamFormatException>(() => to.Buffers.LoadStateBuffer(Packet(version, index, flags, 5)))!.Message, Does.Contain(named).And.Contain("'b'"));
        Assert.That(Assert.Throws<StreamFormatException>(() => to.Buffers.LoadStateBuffer(Packet(0, 0, 0, 0)))!.Message, Does.Contain("12 bytes"));
        to.EndLoad();
    }

    [Test]
    public void AnIndexThatCameBeforeIsRefused()
    {
        using var to = new Side(incoming: true, new FakeVfioDevice("b", VfioMigrationFlags.StopCopy));
        to.BeginLoad();
        to.Buffers.LoadStateBuffer(Packet(0, 3, 0, 5));
        Assert.Throws<StreamFormatException>(() => to.Buffers.LoadStateBuffer(Packet(0, 3, 0, 5)));
        Assert.That(Assert.Throws<StreamFormatException>(() => to.Buffers.LoadStateBuffer(Packet(0, 2, 1, 5)))!.Message, Does.Contain("not the last"));
        to.Buffers.LoadStateBuffer(Packet(0, 4, 1, 5));
        Assert.That(Assert.Throws<StreamFormatException>(() => to.Buffers.LoadStateBuffer(Packet(0, 5, 0, 5)))!.Message, Does.Contain("after the last one"));
        to.EndLoad();
    }

    [Test]
    public void WhatWaitsIsBounded()
    {
        using var to = new Side(incoming: true, new FakeVfioDevice("b", VfioMigrationFlags.StopCopy), new VfioMigrationOptions { MaxQueuedBuffersBytes = 100 });
        to.BeginLoad();
        to.Buffers.LoadStateBuffer(Packet(0, 1, 0, 60));
        Assert.That(Assert.Throws<StreamLimitException>(() => to.Buffers.LoadStateBuffer(Packet(0, 2, 0, 60)))!.Message, Does.Contain("x-migration-max-queued-buffers-size"));
        to.EndLoad();
    }

    /// <summary>Each of several channels sends its packets in order; those that do not fit wait on their channels until the device has taken what comes before.</summary>
    [Test]
    public void AQueueThatIsFullHoldsTheChannelsUp([Values(1 << 20, 1 << 10)] int bytes)
    {
        int most = VfioStateBuffers.MaxHeldBytes / (12 + bytes + VfioStateBuffers.PacketCostBytes), count = most + 30;
        using var to = new Side(incoming: true, new FakeVfioDevice("b", VfioMigrationFlags.StopCopy));
        to.BeginLoad();
        using (to.Vm.Vm.Bql.Acquire()) to.Buffers.SwitchoverStart();
        int taken = 0;
        // The first packet is missing, so the device takes none of the others.
        Thread[] channels = [.. Enumerable.Range(1, 3).Select(first => new Thread(() => Send(first)))];
        foreach (Thread one in channels) one.Start();
        // A channel that waits for the queue's lock looks as one that waits for room does, so the count is looked at too.
        LeakCheck.WaitFor(
            () => Volatile.Read(ref taken) >= most && channels.All(static c => c.ThreadState is ThreadState.WaitSleepJoin or ThreadState.Stopped),
            "the channels neither fill the queue and wait nor end");
        Assert.That(taken, Is.EqualTo(most));
        to.Buffers.LoadStateBuffer(Packet(0, 0, 0, bytes));
        Assert.That(channels.All(static c => c.Join(VfioPair.Deadline)));
        to.Buffers.LoadStateBuffer(Owned(Config((uint)count + 1)));
        to.Buffers.WaitLoaded(CancellationToken.None);
        to.EndLoad();
        Assert.That(to.Device.Io.State, Has.Length.EqualTo((count + 1) * bytes));

        void Send(int first)
        {
            for (int i = first; i <= count; i += 3)
            {
                to.Buffers.LoadStateBuffer(Packet(0, (uint)i, 0, bytes));
                Interlocked.Increment(ref taken);
            }
        }
    }

    [Test]
    public async Task GivingUpWakesAChannelThatWaitsForRoom()
    {
        using var cancel = new CancellationTokenSource();
        using var to = new Side(incoming: true, new FakeVfioDevice("b", VfioMigrationFlags.StopCopy));
        to.BeginLoad(cancel: cancel.Token);
        int taken = 0;
        Task channel = Task.Factory.StartNew(
            () =>
            {
                for (uint i = 1; ; i++)
                {
                    to.Buffers.LoadStateBuffer(Packet(0, i, 0, 1 << 20));
                    Interlocked.Increment(ref taken);
                }
            },
            TaskCreationOptions.LongRunning);
        LeakCheck.WaitFor(() => Volatile.Read(ref taken) == 63, "63 packets and their headers have room");
        await cancel.CancelAsync();
        await Assert.ThrowsAsync<DeviceStateException>(() => channel.WaitAsync(VfioPair.Deadline));
        to.EndLoad();
    }

    [Test]
    public void ADeviceThatRefusesFailsTheLoadAndEverySender()
    {
        using var to = new Side(incoming: true, new FakeVfioDevice("b", VfioMigrationFlags.StopCopy));
        to.BeginLoad();
        to.Device.Io.FailAt = to.Device.Io.Calls.Count;
        to.Buffers.LoadStateBuffer(Packet(0, 0, 0, 10));
        Assert.That(Assert.Throws<VfioException>(() => to.Buffers.WaitLoaded(CancellationToken.None))!.Message, Does.Contain("'b' refused its state"));
        Assert.Throws<DeviceStateException>(() => to.Buffers.LoadStateBuffer(Packet(0, 1, 0, 10)));
        to.EndLoad();
    }

    [Test]
    public async Task GivingUpWakesALoaderThatWaitsForAMissingPacket()
    {
        using var to = new Side(incoming: true, new FakeVfioDevice("b", VfioMigrationFlags.StopCopy));
        to.BeginLoad();
        to.Buffers.LoadStateBuffer(Packet(0, 1, 0, 10));
        using var cancel = new CancellationTokenSource();
        Task wait = Task.Run(() => to.Buffers.WaitLoaded(cancel.Token));
        await cancel.CancelAsync();
        await Assert.ThrowsAsync<DeviceStateException>(() => wait.WaitAsync(VfioPair.Deadline));
        to.EndLoad();
    }

    [Test]
    public void AConfigOnTheMainChannelIsRefusedInThisMode()
    {
        using var to = new Side(incoming: true, new FakeVfioDevice("b", VfioMigrationFlags.StopCopy));
        to.BeginLoad();
        byte[] body = [0xff, 0xff, 0xff, 0xff, 0xef, 0x10, 0, 2, .. new byte[284]];
        Assert.That(Assert.Throws<StreamFormatException>(() => to.Load.State!.LoadState(new QemuFileReader(new MemoryChannel(body)), 1))!.Message, Does.Contain("comes as a packet"));
        to.EndLoad();
    }

    [Test]
    public void APacketOutsideTheModeIsRefused()
    {
        using var to = new Side(incoming: true, new FakeVfioDevice("b", VfioMigrationFlags.StopCopy));
        to.BeginLoad(hasChannels: false);
        Assert.That(to.Load.Buffers, Is.Null);
        to.EndLoad();
    }

    [Test]
    public void AskedForWithoutAChannelThatTakesItTheMigrationIsRefused()
    {
        using var from = new Side(incoming: false, new FakeVfioDevice("a", VfioMigrationFlags.StopCopy), new VfioMigrationOptions { MultifdTransfer = true });
        Assert.That(Assert.Throws<VfioException>(() => from.Handlers.Save!.SavePrepare(new SaveContext()))!.Message, Does.Contain("x-migration-multifd-transfer=on"));
    }

    /// <summary>The config packet of a device like the one that loads, with another index.</summary>
    private static byte[] Config(uint index)
    {
        using var from = new Side(incoming: false, new FakeVfioDevice("a", VfioMigrationFlags.StopCopy));
        byte[] packet = from.SavePackets(out _)[^1];
        BinaryPrimitives.WriteUInt32BigEndian(packet.AsSpan(4), index);
        return packet;
    }

    private static StateBuffer Owned(byte[] bytes)
    {
        StateBuffer buffer = StateBuffer.Rent(bytes.Length);
        bytes.CopyTo(buffer.Span);
        return buffer;
    }

    private static StateBuffer Packet(uint version, uint index, uint flags, int bytes)
    {
        StateBuffer packet = StateBuffer.Rent(12 + bytes);
        packet.Span.Clear();
        BinaryPrimitives.WriteUInt32BigEndian(packet.Span, version);
        BinaryPrimitives.WriteUInt32BigEndian(packet.Span[4..], index);
        BinaryPrimitives.WriteUInt32BigEndian(packet.Span[8..], flags);
        return packet;
    }

    /// <summary>A VM with one device, and the save and load roles of the device's section.</summary>
    private sealed class Side : IDisposable, IDeviceStateSink
    {
        private readonly List<byte[]> _sent = [];

        internal Side(bool incoming, FakeVfioDevice io, VfioMigrationOptions? options = null)
        {
            Vm = VfioPair.Host(64 << 10, incoming);
            Device = VfioPair.Add(Vm, 0, io, options);
            Handlers = Vm.Vm.SaveVm.Entries().Single(static e => e.IdStr == "0000:00:02.0/vfio").Handlers!;
        }

        internal TestVm Vm { get; }

        internal FakeVfioPci Device { get; }

        internal SaveVmHandlers Handlers { get; }

        internal LoadRoles Load { get; private set; } = new();

        internal ILoadStateBuffer Buffers => Load.Buffers!;

        public void Send(StateBuffer buffer)
        {
            _sent.Add(buffer.Span.ToArray());
            buffer.Dispose();
        }

        internal List<byte[]> SavePackets(out byte[] main)
        {
            var channel = new MemoryChannel();
            using var f = new QemuFileWriter(channel);
            SaveRoles save;
            using (Vm.Vm.Bql.Acquire())
            {
                save = Handlers.Save!.SavePrepare(new SaveContext { DataChannels = new NoChannels() });
                save.Setup!.SaveSetup(new QemuFileWriter(new MemoryChannel()));
                Vm.Vm.RunState.Start();
                Vm.Vm.RunState.Stop(RunState.FinishMigrate);
                f.Write(new byte[5]);
                save.Live!.SaveLiveCompletePrecopy(f);
                f.Flush();
            }
            save.CompleteThread!.SaveLiveCompletePrecopyThread(this, CancellationToken.None);
            using (Vm.Vm.Bql.Acquire()) save.Cleanup!.SaveCleanup();
            main = channel.Written;
            return _sent;
        }

        internal void BeginLoad(bool hasChannels = true, CancellationToken cancel = default)
        {
            using (Vm.Vm.Bql.Acquire()) Load = Handlers.Load!.LoadSetup(new LoadContext { HasDataChannels = hasChannels, Cancel = cancel });
        }

        internal void EndLoad()
        {
            using (Vm.Vm.Bql.Acquire()) Load.Cleanup!.LoadCleanup();
        }

        public void Dispose() => Vm.Dispose();
    }

    /// <summary>Makes the device believe that data channels exist; the test itself takes the packets.</summary>
    private sealed class NoChannels : IDataChannels
    {
        public bool CarriesState => true;

        public bool DetectsZeroPages => false;

        public SentPages Sent => default;

        public void AddPage(RamBlock block, long page, bool isZero) => throw new InvalidOperationException();

        public bool Sync(bool always) => throw new InvalidOperationException();

        public void SendState(string idStr, int instanceId, StateBuffer buffer) => throw new InvalidOperationException();
    }
}
