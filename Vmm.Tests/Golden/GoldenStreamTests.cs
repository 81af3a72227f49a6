using System.Security.Cryptography;
using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.GoldenTests;

/// <summary>Captured QEMU streams load, vmm saves the same content to the same bytes, and every proper prefix fails cleanly.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
internal sealed class GoldenStreamTests
{
    private static readonly Guid s_uuid = Guid.Parse("11112222-3333-4444-5555-666677778888");
    private const int PrefixParts = 8;
    private static readonly MigrationCompat s_switchoverStart = new() { SendSwitchoverStart = true };

    /// <summary>Name, whether RAM is RAM_A, framing, run state after the load.</summary>
    private static IEnumerable<TestCaseData> Loadable()
    {
        MigrationCompat plain = new();
        (string Name, bool RamA, MigrationCompat Compat, RunState State)[] rows =
        [
            ("none-72-noram.bin", false, plain, RunState.PreLaunch),
            ("none-72-noram-running.bin", false, plain, RunState.Running),
            ("none-72-plain.bin", true, plain, RunState.PreLaunch),
            ("none-72-return-path.main.fwd.bin", true, plain, RunState.PreLaunch),
            ("none-72-savevm.bin", true, plain, RunState.PreLaunch),
            ("none-111-noram.bin", false, plain, RunState.PreLaunch),
            ("none-111-noram-running.bin", false, plain, RunState.Running),
            ("none-111-plain.bin", true, plain, RunState.PreLaunch),
            ("none-111-return-path.main.fwd.bin", true, plain, RunState.PreLaunch),
            ("none-111-uuid.bin", false, plain, RunState.PreLaunch),
            ("none-111-noconfig-novmdesc.bin", false, plain with { SendConfiguration = false, SuppressVmDesc = true }, RunState.PreLaunch),
            ("none-111-noglobalstate-nofooter.bin", false, plain with { SendSectionFooter = false }, RunState.Running),
            ("none-111-noswitchoverstart.bin", true, plain, RunState.PreLaunch),
            ("none-111-zeropage-none.bin", true, plain, RunState.PreLaunch),
            ("none-111-savevm-running.bin", true, plain, RunState.Running),
        ];
        return rows.Select(r => new TestCaseData(r.Name, r.RamA, r.Compat, r.State).SetArgDisplayNames(r.Name));
    }

    [TestCaseSource(nameof(Loadable))]
    public async Task QemuStreamLoads(string name, bool ramA, MigrationCompat compat, RunState state)
    {
        using TestVm vm = Destination(ramA, name);
        vm.FullEngine.Compat = compat;
        var channel = new GoldenChannel(Golden.Read(name));
        Assert.That(await vm.Engine.MigrateIncoming(channel), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        Assert.That(channel.Unread, Is.Zero);
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(state));
        if (ramA) Assert.That(vm.Ram.ReadOnlySlice(0, 1 << 20).SequenceEqual(Golden.RamA()), "RAM differs from RAM_A");
    }

    [Test]
    public async Task BackgroundSnapshotWithoutEndSectionLoads()
    {
        using TestVm vm = Destination(ram: true, "none-111-bgsnapshot.bin");
        // The destination's memory starts non-zero, so that the test fails when a load skips the stream's zero pages.
        vm.FilledRandom(7);
        Assert.That(await vm.Engine.MigrateIncoming(new MemoryChannel(Golden.Read("none-111-bgsnapshot.bin"))), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        Assert.That(vm.Ram.ReadOnlySlice(0, 1 << 20).IndexOfAnyExcept((byte)0), Is.EqualTo(-1));
    }

    [TestCase("none-111-xbzrle")]
    [TestCase("none-72-xbzrle")]
    public async Task XbzrleStreamGivesTheExpectedRam(string name)
    {
        using TestVm vm = Destination(ram: true, name);
        // The capture has a CPU object, which vmm lacks. Its two sections are opaque here; their lengths come from the capture's VMDESC.
        byte[] stream = Golden.Read(name + ".bin");
        foreach ((string id, int version, int length) in CpuSections(stream))
            vm.Vm.SaveVm.Register(new SaveVmRegistration { IdStr = id, InstanceId = 0, VersionId = version, MinimumVersionId = version }, SaveVmHandlers.Of(new Opaque(length)));
        Assert.That(await vm.Engine.MigrateIncoming(new MemoryChannel(stream)), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        Assert.That(vm.Ram.ReadOnlySlice(0, 1 << 20).SequenceEqual(Golden.Read(name + ".ram.bin")));
    }

    /// <summary>Name, whether RAM is RAM_A, framing, section ids to reserve before ram and before globalstate, UUID.</summary>
    private static IEnumerable<TestCaseData> Saveable()
    {
        MigrationCompat legacy = new() { LegacyDescriptions = true };
        (string Name, bool RamA, MigrationCompat Compat, bool Qemu72Ids, bool ZeroDetection)[] rows =
        [
            ("none-111-noram.bin", false, s_switchoverStart, false, true),
            ("none-111-plain.bin", true, s_switchoverStart, false, true),
            ("none-111-noswitchoverstart.bin", true, new(), false, true),
            ("none-111-uuid.bin", false, s_switchoverStart, false, true),
            ("none-111-zeropage-none.bin", true, s_switchoverStart, false, false),
            ("none-111-noconfig-novmdesc.bin", false, s_switchoverStart with { SendConfiguration = false, SuppressVmDesc = true }, false, true),
            ("none-111-noglobalstate-nofooter.bin", false, s_switchoverStart with { SendSectionFooter = false, StoreGlobalState = false }, false, true),
            ("none-72-noram.bin", false, legacy, true, true),
            ("none-72-plain.bin", true, legacy, true, true),
            ("none-72-savevm.bin", true, legacy, true, true),
        ];
        return rows.Select(r => new TestCaseData(r.Name, r.RamA, r.Compat, r.Qemu72Ids, r.ZeroDetection).SetArgDisplayNames(r.Name));
    }

    [TestCaseSource(nameof(Saveable))]
    public async Task WhatWeSaveEqualsQemu(string name, bool ramA, MigrationCompat compat, bool qemu72Ids, bool zeroDetection)
    {
        using TestVm vm = Source(ramA, name, qemu72Ids);
        vm.FullEngine.Compat = compat;
        if (!zeroDetection) vm.Engine.Parameters = vm.Engine.Parameters with { ZeroPageDetection = ZeroPageDetection.None };
        if (name.Contains("uuid")) vm.Engine.SetCapabilities([new(MigrationCapability.ValidateUuid, true)]);
        var channel = new MemoryChannel();
        Assert.That(await vm.Engine.Migrate(channel), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        AssertBytes(channel.Written, Golden.Read(name));
    }

    [Test]
    public async Task ReturnPathStreamEqualsQemuInBothDirections()
    {
        using TestVm source = Source(ram: true, "", qemu72Ids: false);
        using TestVm destination = Destination(ram: true, "");
        source.FullEngine.Compat = s_switchoverStart;
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        (InMemoryChannel a, InMemoryChannel b) = InMemoryChannel.CreatePair();
        var forward = new RecordingChannel(a);
        var back = new RecordingChannel(b);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(back);
        Assert.That(await source.Engine.Migrate(forward), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(await incoming, Is.EqualTo(MigrationStatus.Completed));
        // What two vmm say to each other besides: the offer of a final word behind the first PING, its acceptance, and the word itself behind the stream.
        byte[] ping = Convert.FromHexString("080002000400000001"), offer = Convert.FromHexString("0800020004766d6d01"), word = Convert.FromHexString("0876010000");
        AssertBytes(forward.Written, [.. Behind(ping, Golden.Read("none-111-return-path.main.fwd.bin"), offer), .. word]);
        byte[] pong = Convert.FromHexString("0002000400000001"), accept = Convert.FromHexString("00020004766d6d0200020004766d6d01");
        AssertBytes(back.Written, Behind(pong, Golden.Read("none-111-return-path.main.rp.bin"), accept));
    }

    private static byte[] Behind(byte[] mark, byte[] stream, byte[] inserted)
    {
        int at = stream.AsSpan().IndexOf(mark) + mark.Length;
        Assert.That(at, Is.GreaterThanOrEqualTo(mark.Length));
        return [.. stream[..at], .. inserted, .. stream[at..]];
    }

    /// <summary>Runs in parts, because a test counts as hung after five minutes: all 44,000 prefixes take 40 s, on a busy machine much longer.</summary>
    [Test]
    public async Task EveryProperPrefixFailsCleanly(
        [Values("none-72-plain.bin", "none-111-plain.bin", "none-111-noram-running.bin", "none-111-uuid.bin")] string name,
        [Range(0, PrefixParts - 1)] int part)
    {
        byte[] stream = Golden.Read(name);
        // The stream is complete at EOF, because VMDESC is optional, as in QEMU (stream 1.6).
        int whole = stream.AsSpan().LastIndexOf("{\"configuration\""u8);
        if (whole < 0) whole = stream.AsSpan().LastIndexOf("{\"page_size\""u8);
        int end = whole - 5;
        using TestVm vm = Destination(ram: name.Contains("plain"), name);
        for (int length = end * part / PrefixParts; length < end * (part + 1) / PrefixParts; length++)
        {
            MigrationStatus status = await vm.Engine.MigrateIncoming(new MemoryChannel(stream[..length]));
            Assert.That(status, Is.EqualTo(MigrationStatus.Failed), $"prefix of {length} bytes");
            Assert.That(vm.Engine.Query().Error!.ToString(), Does.Contain("ended"), $"prefix of {length} bytes");
            Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.InMigrate));
        }
        Assert.That(await vm.Engine.MigrateIncoming(new MemoryChannel(stream)), Is.EqualTo(MigrationStatus.Completed), "the whole stream loads after all those failures");
    }

    [TestCase("q35-111-devices.bin", "machine type differs: 'none' here, 'pc-q35-11.1' in the stream")]
    [TestCase("pc-111-devices.bin", "machine type differs: 'none' here, 'pc-i440fx-11.1' in the stream")]
    [TestCase("none-111-mapped-ram.bin", "capability 'mapped-ram'")]
    [TestCase("none-111-ignore-shared.bin", "capability 'x-ignore-shared'")]
    [TestCase("none-111-postcopy.main.fwd.bin", "capability postcopy-ram off")]
    [TestCase("none-111-noconfig-novmdesc.bin", "expected CONFIGURATION")]
    public async Task AStreamForAnotherMachineOrFeatureIsRefusedByName(string name, string cause)
    {
        using TestVm vm = Destination(ram: true, name);
        Assert.That(await vm.Engine.MigrateIncoming(new GoldenChannel(Golden.Read(name))), Is.EqualTo(MigrationStatus.Failed));
        Assert.That($"{vm.Engine.Query().Error}", Does.Contain(cause));
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.InMigrate));
    }

    [Test]
    public void EveryCaptureHasTheDocumentedChecksum()
    {
        string readme = File.ReadAllText(Path.Combine(AppContext.BaseDirectory, "Golden", "qemu", "README.md"));
        foreach (string name in Golden.Names)
            Assert.That(readme, Does.Contain(Convert.ToHexStringLower(SHA256.HashData(Golden.Read(name)))), name);
    }

    private static TestVm Destination(bool ram, string name) => new(new VmOptions
    {
        IsIncoming = true, Uuid = name.Contains("uuid") ? s_uuid : Guid.Empty,
        Memory = ram ? [new RamBlockOptions { Name = "m", SizeBytes = 1 << 20 }] : [],
    });

    private static TestVm Source(bool ram, string name, bool qemu72Ids)
    {
        var vm = new TestVm(
            new VmOptions
            {
                Uuid = name.Contains("uuid") ? s_uuid : Guid.Empty,
                Memory = ram ? [new RamBlockOptions { Name = "m", SizeBytes = 1 << 20 }] : [],
            },
            b => { if (qemu72Ids) b.Services.Insert(0, Microsoft.Extensions.DependencyInjection.ServiceDescriptor.Scoped<IMachineComponent, Qemu72BlockSection>()); });
        vm.FullEngine.Context.IterateLimit = TimeSpan.FromMinutes(1); // The capture has all RAM in one section, so no limit may split ours.
        return ram ? vm.Filled(Golden.RamA()) : vm;
    }

    private static void AssertBytes(byte[] actual, byte[] expected)
    {
        int at = actual.AsSpan().CommonPrefixLength(expected);
        Assert.That(at == expected.Length && at == actual.Length,
            $"first difference at offset {at} of {expected.Length} (we wrote {actual.Length}): expected {Convert.ToHexString(expected.AsSpan(at, Math.Min(16, expected.Length - at)))}, "
            + $"found {Convert.ToHexString(actual.AsSpan(at, Math.Min(16, actual.Length - at)))}");
    }

    private static IEnumerable<(string Id, int Version, int Length)> CpuSections(byte[] stream)
    {
        foreach (string id in (string[])["cpu_common", "cpu"])
        {
            byte[] header = [(byte)id.Length, .. System.Text.Encoding.ASCII.GetBytes(id), 0, 0, 0, 0];
            int at = stream.AsSpan().IndexOf(header) + header.Length;
            int version = System.Buffers.Binary.BinaryPrimitives.ReadInt32BigEndian(stream.AsSpan(at));
            uint sectionId = System.Buffers.Binary.BinaryPrimitives.ReadUInt32BigEndian(stream.AsSpan(at - header.Length - 4));
            byte[] footer = [0x7e, (byte)(sectionId >> 24), (byte)(sectionId >> 16), (byte)(sectionId >> 8), (byte)sectionId, 4];
            yield return (id, version, stream.AsSpan(at + 4).IndexOf(footer));
        }
    }

    private sealed class Opaque(int length) : ILoadState
    {
        public void LoadState(Core.Wire.QemuFileReader f, int versionId) => f.Skip(length);
    }

    /// <summary>QEMU 7.2 registers <c>block</c> before <c>ram</c>. <c>block</c> takes a section id but never appears in a stream.</summary>
    private sealed class Qemu72BlockSection : IMachineComponent
    {
        public MachinePhase Phase => MachinePhase.BeforeDevices;

        public void Attach(IDeviceServices services) => services.SaveVm.ReserveSectionId();

        public void Dispose()
        {
        }
    }
}
