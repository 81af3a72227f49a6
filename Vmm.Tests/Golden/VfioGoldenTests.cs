using System.Globalization;
using System.Text;
using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Migration;
using Vmm.Migration.Stream;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.GoldenTests;

/// <summary>Both protocols save exactly the bytes of the hand-computed streams in Golden/vfio, and load them.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class VfioGoldenTests
{
    private static readonly string[] s_files = ["v2.hex", "v2-empty.hex", "v2-precopy-ends-early.hex", "v2-switchover-ack.hex", "v1.hex", "v1-empty.hex"];

    [Test]
    public void TheStreamIsTheGoldenOne([ValueSource(nameof(s_files))] string file)
    {
        using var machine = new Machine(Source(file));
        byte[] written = machine.Save(file.Contains("ack", StringComparison.Ordinal), iterations: file == "v2-empty.hex" ? 0 : 2);
        Assert.That(Convert.ToHexString(written), Is.EqualTo(Convert.ToHexString(Read(file))));
    }

    [Test]
    public void TheGoldenStreamLoadsBack([ValueSource(nameof(s_files))] string file)
    {
        using var machine = new Machine(Empty(file));
        Assert.That(machine.Load(Read(file), switchoverAck: true), Is.EqualTo(file.Contains("ack", StringComparison.Ordinal) ? 1 : 0), "acknowledgements");
        byte[] expected = Data(file);
        Assert.That(machine.Loaded, Is.EqualTo(expected));
        Assert.That(machine.Device.Config.Bytes[..5], Is.EqualTo((byte[])[0, 0, 0, 2, 0x5a]));
        Assert.That(machine.Device.State, Is.EqualTo(file[1] == '2' ? VfioDeviceState.Stop : VfioDeviceState.Resuming));
    }

    [Test]
    public void EveryProperPrefixFails([ValueSource(nameof(s_files))] string file)
    {
        byte[] stream = [.. Read(file), 0];
        int failed = 0;
        using var machine = new Machine(Empty(file));
        for (int n = 0; n < stream.Length; n++)
        {
            byte[] prefix = stream[..n];
            Assert.Throws<StreamTruncatedException>(() => machine.Load(prefix, switchoverAck: true, withEof: false), $"{n} bytes");
            machine.Device.Reset();
            failed++;
        }
        Assert.That(failed, Is.EqualTo(stream.Length));
    }

    [Test]
    public void ATagNobodyKnowsIsRefusedWithItsPlace()
    {
        byte[] stream = Read("v2.hex");
        int at = stream.AsSpan().IndexOf((byte[])[0xff, 0xff, 0xff, 0xff, 0xef, 0x10, 0, 4]);
        foreach (byte tag in (byte[])[0, 6, 7, 0xff])
        {
            byte[] bad = [.. stream];
            bad[at + 7] = tag;
            using var machine = new Machine(Empty("v2.hex"));
            StreamFormatException e = Assert.Throws<StreamFormatException>(() => machine.Load(bad, switchoverAck: false))!;
            Assert.That(e.Message, Does.Contain("tag of VFIO state").And.Contain("0000:00:02.0/vfio"));
        }
    }

    [Test]
    public void FirstDataThatNobodyAcknowledgesIsRefused()
    {
        using var machine = new Machine(Empty("v2.hex"));
        Assert.That(Assert.Throws<IncompatibleStateException>(() => machine.Load(Read("v2-switchover-ack.hex"), switchoverAck: false))!.Hint, Does.Contain("switchover-ack"));
        using var without = new Machine(new FakeVfioDevice("x", VfioMigrationFlags.StopCopy));
        Assert.That(Assert.Throws<StreamFormatException>(() => without.Load(Read("v2-switchover-ack.hex"), switchoverAck: true))!.Message, Does.Contain("INIT_DATA_SENT"));
    }

    /// <summary>The stream does not name the protocol that wrote it, so only the device can refuse the other protocol's data (vfio-migration 5.6).</summary>
    [Test]
    public void DataOfTheOtherProtocolFailAsTheDeviceSays()
    {
        using var v2 = new Machine(new FakeVfioDevice("new", VfioMigrationFlags.StopCopy) { Accept = static _ => Errno.EFAULT });
        Assert.That(Assert.Throws<VfioException>(() => v2.Load(Read("v1.hex"), switchoverAck: false))!.Message,
            Is.EqualTo("device 'new' refused to go from RESUMING to STOP (EFAULT); the device was reset"));
        using var v1 = new Machine(new FakeVfioDevice("old") { V1 = new FakeV1Region(4096) });
        v1.Device.Io.V1!.RefuseAt = 1;
        v1.Load(Read("v2.hex"), switchoverAck: false);
        // A v1 device accepts or refuses its data only when the VM starts.
        DeviceStateException e = Assert.Throws<DeviceStateException>(() =>
        {
            using (v1.Services.Bql.Acquire()) v1.Services.Notifier.Start();
        })!;
        Assert.That(e.Message, Does.Contain("'old' refused to go from RESUMING to RUNNING (EBUSY)"));
        Assert.That(v1.Services.Notifier.IsRunning, Is.False);
    }

    private static FakeVfioDevice Source(string file)
    {
        if (file[1] == '1')
        {
            byte[] all = Data(file);
            // The device stages chunks of 24, 64 and 8 bytes, and the section has a record for each.
            return new FakeVfioDevice("v1") { V1 = new FakeV1Region(4096) { Data = all, ChunkSizes = all.Length == 0 ? [] : [24, 64, 8] } };
        }
        var device = new FakeVfioDevice("v2", file == "v2-empty.hex" ? VfioMigrationFlags.StopCopy : VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy) { MaxTransfer = 64 };
        switch (file)
        {
            case "v2.hex":
                device.Precopy.Enqueue(Fill(0x11, 24));
                device.Precopy.Enqueue(Fill(0x22, 8));
                device.State = Fill(0x33, 72);
                break;
            case "v2-precopy-ends-early.hex":
                device.Precopy.Enqueue(Fill(0x11, 24));
                device.Precopy.Enqueue(null);
                device.State = Fill(0x33, 5);
                break;
            case "v2-switchover-ack.hex":
                device.PrecopyInfo = () => new VfioPrecopyInfo(device.Precopy.Count == 2 ? 24UL : 0, 8);
                device.Precopy.Enqueue(Fill(0x11, 24));
                device.Precopy.Enqueue(Fill(0x22, 8));
                device.State = Fill(0x33, 5);
                break;
        }
        return device;
    }

    private static FakeVfioDevice Empty(string file) => file[1] == '1'
        ? new FakeVfioDevice("v1") { V1 = new FakeV1Region(4096) }
        : new FakeVfioDevice("v2", VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy) { MaxTransfer = 5 };

    private static byte[] Data(string file) => file switch
    {
        "v2.hex" => [.. Fill(0x11, 24), .. Fill(0x22, 8), .. Fill(0x33, 72)],
        "v2-precopy-ends-early.hex" => [.. Fill(0x11, 24), .. Fill(0x33, 5)],
        "v2-switchover-ack.hex" => [.. Fill(0x11, 24), .. Fill(0x22, 8), .. Fill(0x33, 5)],
        "v1.hex" => [.. Fill(0x11, 24), .. Fill(0x22, 64), .. Fill(0x33, 8)],
        _ => [],
    };

    private static byte[] Fill(byte value, int count)
    {
        byte[] bytes = new byte[count];
        Array.Fill(bytes, value);
        return bytes;
    }

    private static byte[] Read(string file)
    {
        var bytes = new List<byte>();
        foreach (string line in File.ReadLines(Path.Combine(AppContext.BaseDirectory, "Golden", "vfio", file)))
        {
            foreach (string token in line.Split('#')[0].Split(' ', StringSplitOptions.RemoveEmptyEntries))
            {
                if (token[0] == '"') { bytes.AddRange(Encoding.ASCII.GetBytes(token.Trim('"'))); continue; }
                string[] repeat = token.Split('*');
                byte value = byte.Parse(repeat[0], NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture);
                bytes.AddRange(Enumerable.Repeat(value, repeat.Length == 1 ? 1 : int.Parse(repeat[1], CultureInfo.InvariantCulture)));
            }
        }
        return [.. bytes];
    }

    /// <summary>A section registry with one VFIO device, whose section follows three others.</summary>
    private sealed class Machine : IDisposable
    {
        private readonly ServiceProvider _provider;

        internal Machine(FakeVfioDevice io)
        {
            var collection = new ServiceCollection();
            collection.AddSingleton<IDeviceServices>(_ => Services!);
            collection.AddSingleton<VfioMigrationHost>();
            _provider = collection.BuildServiceProvider();
            Services = new TestServices { Scope = _provider };
            for (int i = 0; i < 3; i++) Services.SaveVm.ReserveSectionId();
            using (Services.Bql.Acquire()) Device = new FakeVfioPci("vfio0", "0000:00:02.0", io, Services);
            (Device.Config.Bytes[3], Device.Config.Bytes[4]) = (2, 0x5a);
        }

        internal TestServices Services { get; }

        internal FakeVfioPci Device { get; }

        internal byte[] Loaded => Device.Io.V1 is { } v1 ? [.. v1.Committed.SelectMany(static c => c)] : Device.Io.State;

        internal byte[] Save(bool switchoverAck, int iterations)
        {
            var channel = new MemoryChannel();
            using var f = new QemuFileWriter(channel);
            var stream = new SaveStream(Services.SaveVm, f, new SaveContext { Capabilities = MigrationCapabilities.None.With(MigrationCapability.SwitchoverAck, switchoverAck) });
            using (Services.Bql.Acquire())
            {
                Services.Notifier.Start();
                stream.SavePrepare();
                stream.SaveSetup();
            }
            for (int i = 0; i < iterations; i++) stream.SaveLiveIterate(IterateBudget.Unlimited);
            using (Services.Bql.Acquire())
            {
                Services.Notifier.Stop(RunState.FinishMigrate);
                stream.SaveLiveCompletePrecopy();
                stream.SaveState();
            }
            f.Flush();
            stream.SaveCleanup();
            return channel.Written;
        }

        internal int Load(byte[] bytes, bool switchoverAck, bool withEof = true)
        {
            int acks = 0;
            var back = new MemoryChannel();
            var f = new QemuFileReader(new MemoryChannel(withEof ? [8, 0, 1, 0, 0, .. bytes, 0] : bytes));
            var commands = new CommandReader(f, () => new ReturnPathWriter(back));
            var context = new LoadContext { ApproveSwitchover = switchoverAck ? () => commands.ReturnPath?.SendSwitchoverAck() : null };
            var stream = new LoadStream(Services.SaveVm, f, context) { ReadCommand = commands.Read };
            commands.Sections = stream;
            try
            {
                stream.LoadSetup();
                stream.ReadSections();
            }
            finally
            {
                stream.LoadCleanup();
            }
            for (int i = 0; i + 4 <= back.Written.Length; i += 4)
                if (back.Written.AsSpan(i, 4).SequenceEqual((byte[])[0, 7, 0, 0])) acks++;
            return acks;
        }

        public void Dispose()
        {
            using (Services.Bql.Acquire()) Device.Dispose();
            Services.Dispose();
            _provider.Dispose();
        }
    }
}
