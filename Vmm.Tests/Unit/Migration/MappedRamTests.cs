using System.Buffers.Binary;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration;

/// <summary>Pages at fixed places in a file (stream 5).</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class MappedRamTests
{
    private const ulong Size = 4 << 20;
    private const int PageSize = RamBlock.PageSize;
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(60);

    [TestCase("")]
    [TestCase(",offset=12345")]
    public async Task ARunningVmGoesThroughAFileThatGrowsNoLarger(string offset)
    {
        using var folder = new TempDirectory();
        using TestVm source = TestVm.WithRam(Size).FilledRandom(1, halfZero: true), destination = TestVm.WithRam(Size, incoming: true);
        source.Vm.Cont();
        using var writer = new BackgroundWriter(source);
        On(source);
        source.Engine.Parameters = source.Engine.Parameters with { DowntimeLimitMs = 0, MaxBandwidthBytesPerSecond = 16 << 20 };
        Task<MigrationStatus> outgoing = source.Engine.Migrate(MigrationAddress.Parse($"file:{folder["m"]}{offset}"));
        LeakCheck.WaitFor(() => source.Engine.Query() is { Ram.NormalPages: > 900 } or { Status: MigrationStatus.Failed or MigrationStatus.Completed }, "pages go more than once");
        source.Engine.Parameters = source.Engine.Parameters with { DowntimeLimitMs = 1000, MaxBandwidthBytesPerSecond = 0 };
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        writer.Dispose();
        await Load(destination, $"file:{folder["m"]}{offset}", MigrationStatus.Completed);
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
        Assert.That(new FileInfo(folder["m"]).Length, Is.LessThan((long)Size + (2 << 20)));
        Assert.That(source.Engine.Query().Ram!.TransferredBytes, Is.GreaterThan(900 * PageSize));
    }

    [Test]
    public async Task ZeroPagesTakeNoRoomInTheFile()
    {
        using var folder = new TempDirectory();
        using TestVm source = TestVm.WithRam(64 << 20);
        for (int page = 0; page < 100; page++) source.Ram.Slice((ulong)page * 11 * PageSize, 1)[0] = 1;
        await Save(source, folder["m"]);
        using OwnedFd fd = Posix.Open(folder["m"], Posix.O_RDONLY, 0, out _)!;
        long data = 0;
        for (long at = 0; (at = Posix.SeekData(fd, at)) >= 0;)
        {
            long end = Posix.SeekHole(fd, at);
            (data, at) = (data + end - at, end);
        }
        // Beside the pages stand the head with the bitmap, and the end of the stream.
        Assert.That(data, Is.InRange(100 * PageSize, 105 * PageSize));
    }

    [Test]
    public async Task APageThatTurnsZeroIsZeroAtTheDestination()
    {
        using var folder = new TempDirectory();
        using TestVm source = TestVm.WithRam(Size).FilledRandom(2), destination = TestVm.WithRam(Size, incoming: true);
        On(source);
        source.Engine.SetCapabilities([new(MigrationCapability.PauseBeforeSwitchover, true)]);
        Task<MigrationStatus> outgoing = source.Engine.Migrate(MigrationAddress.Parse($"file:{folder["m"]}"));
        LeakCheck.WaitFor(() => source.Engine.Status is MigrationStatus.PreSwitchover or MigrationStatus.Failed, "pre-switchover");
        source.Ram.Slice(5 * PageSize, 3 * PageSize).Clear();
        source.Ram.MarkDirty(5 * PageSize, 3 * PageSize);
        source.Engine.Continue(MigrationStatus.PreSwitchover);
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        await Load(destination, $"file:{folder["m"]}", MigrationStatus.Completed);
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
    }

    [Test]
    public async Task RamThatIsNotZeroIsReplaced()
    {
        using var folder = new TempDirectory();
        using TestVm source = TestVm.WithRam(Size).FilledRandom(3, halfZero: true), destination = TestVm.WithRam(Size, incoming: true).FilledRandom(4);
        await Save(source, folder["m"]);
        await Load(destination, $"file:{folder["m"]}", MigrationStatus.Completed);
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
    }

    [Test]
    public async Task SeveralBlocksStandOneBehindTheOther()
    {
        using var folder = new TempDirectory();
        using TestVm source = WithBlocks(incoming: false).FilledRandom(5, halfZero: true), destination = WithBlocks(incoming: true);
        await Save(source, folder["m"]);
        await Load(destination, $"file:{folder["m"]}", MigrationStatus.Completed);
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
    }

    /// <summary>Every number of a block's header, and the end of its bitmap, with values that a writer has no reason to write.</summary>
    [Test]
    public async Task BadPlacesAreRefusedByName()
    {
        using var folder = new TempDirectory();
        using TestVm source = TestVm.WithRam(Size - PageSize).FilledRandom(6);
        await Save(source, folder["m"]);
        byte[] good = File.ReadAllBytes(folder["m"]);
        int header = good.AsSpan().IndexOf((byte[])[1, (byte)'m', 0, 0, 0, 0, 0, 0x3f, 0xf0, 0]) + 10;
        long length = good.Length, bitmap = BinaryPrimitives.ReadInt64BigEndian(good.AsSpan(header + 12)), pages = BinaryPrimitives.ReadInt64BigEndian(good.AsSpan(header + 20));
        Assert.That((bitmap, pages), Is.EqualTo(((long)header + 28, 1L << 20)));
        long[] places = [0, 1, header, bitmap - 1, bitmap + 1, bitmap + 4096, pages - 64, pages + 1, pages + 4096, length - 4096, length, length + 4096, 1L << 62, long.MaxValue, -4096, -1];
        var offsets = new List<(int At, long Value, string Names)>();
        foreach (long value in (long[])[0, 1, 4095, 8192, -1]) offsets.Add((header + 4, value, "mapped-ram page size"));
        // A bitmap elsewhere before the pages cannot be told from a good one, and has other bits only.
        foreach (long value in places.Where(v => v < bitmap || v > pages - 128)) offsets.Add((header + 12, value, "bitmap of RAM block"));
        foreach (long value in places.Where(v => v < bitmap + 128 || v % 4096 != 0 || v + (long)Size - 4096 > length)) offsets.Add((header + 20, value, "RAM block 'm'"));
        foreach ((int at, long value, string names) in offsets)
        {
            byte[] bad = [.. good];
            BinaryPrimitives.WriteInt64BigEndian(bad.AsSpan(at), value);
            Assert.That(await Refusal(bad), Does.Contain(names), $"0x{value:x} at 0x{at:x}");
        }
        byte[] version = [.. good];
        version[header + 3] = 2;
        Assert.That(await Refusal(version), Does.Contain("mapped-ram header version"));
        byte[] bits = [.. good];
        bits[bitmap + 127] |= 0x80;
        Assert.That(await Refusal(bits), Does.Contain("bits for 1023 pages"));
    }

    [Test]
    public async Task AFileThatIsCutAnywhereIsRefused()
    {
        using var folder = new TempDirectory();
        using TestVm source = TestVm.WithRam(Size - PageSize).FilledRandom(7);
        await Save(source, folder["m"]);
        byte[] good = File.ReadAllBytes(folder["m"]);
        int[] lengths = [0, 4, 30, 60, 100, 300, (1 << 20) - 1, 1 << 20, good.Length / 2, good.Length - 2000, good.Length - 700];
        foreach (int length in lengths) Assert.That(await Refusal(good[..Math.Min(length, good.Length - 600)]), Is.Not.Empty, $"{length} bytes");
    }

    [Test]
    public async Task PageRecordsAreRefused([Values(0x008UL, 0x002UL, 0x040UL, 0x200UL)] ulong flag)
    {
        using var folder = new TempDirectory();
        using TestVm source = TestVm.WithRam(Size - PageSize).FilledRandom(8);
        await Save(source, folder["m"]);
        byte[] bad = File.ReadAllBytes(folder["m"]);
        // The list's EOS follows the pages.
        BinaryPrimitives.WriteUInt64BigEndian(bad.AsSpan((1 << 20) + (int)Size - PageSize), flag);
        Assert.That(await Refusal(bad), Does.Contain("no page records"));
    }

    [Test]
    public async Task BothSidesNeedTheCapability()
    {
        using var folder = new TempDirectory();
        using TestVm source = TestVm.WithRam(Size).FilledRandom(9), off = TestVm.WithRam(Size, incoming: true), on = TestVm.WithRam(Size, incoming: true);
        await Save(source, folder["m"]);
        Assert.That(await off.Engine.MigrateIncoming(MigrationAddress.Parse($"file:{folder["m"]}")), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(off.Engine.Query().Error!.Message, Does.Contain("capability 'mapped-ram' is off here and on at the source"));
        using TestVm plain = TestVm.WithRam(Size).FilledRandom(9);
        Assert.That(await plain.Engine.Migrate(MigrationAddress.Parse($"file:{folder["plain"]}")), Is.EqualTo(MigrationStatus.Completed));
        await Load(on, $"file:{folder["plain"]}", MigrationStatus.Failed);
        Assert.That(on.Engine.Query().Error!.Message, Does.Contain("capability 'mapped-ram' is on here and off at the source"));
    }

    [TestCase("tcp:127.0.0.1:1")]
    [TestCase("exec:cat > /dev/null")]
    public void AChannelThatCannotSeekIsRefusedAtOnce(string uri)
    {
        using TestVm source = TestVm.WithRam(Size), destination = TestVm.WithRam(Size, incoming: true);
        On(source);
        On(destination);
        Assert.That(() => source.Engine.Migrate(MigrationAddress.Parse(uri)), Throws.TypeOf<ConfigurationException>().With.Message.EqualTo("Migration requires seekable transport (e.g. file)"));
        Assert.That(() => destination.Engine.MigrateIncoming(MigrationAddress.Parse(uri)), Throws.TypeOf<ConfigurationException>().With.Message.EqualTo("Migration requires seekable transport (e.g. file)"));
    }

    private static void On(TestVm vm) => vm.Engine.SetCapabilities([new(MigrationCapability.MappedRam, true)]);

    private static async Task Save(TestVm source, string path)
    {
        On(source);
        Assert.That(await source.Engine.Migrate(MigrationAddress.Parse($"file:{path}")).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
    }

    private static async Task Load(TestVm destination, string uri, MigrationStatus expected)
    {
        On(destination);
        Assert.That(await destination.Engine.MigrateIncoming(MigrationAddress.Parse(uri)).WaitAsync(s_deadline), Is.EqualTo(expected), () => $"{destination.Engine.Query().Error}");
    }

    /// <summary>Why these bytes do not load.</summary>
    private static async Task<string> Refusal(byte[] bytes)
    {
        using TestVm vm = TestVm.WithRam(Size - PageSize, incoming: true);
        On(vm);
        Assert.That(await vm.Engine.MigrateIncoming(new MemoryFile(bytes)).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.InMigrate));
        return vm.Engine.Query().Error!.Message;
    }

    private static TestVm WithBlocks(bool incoming) => new(new VmOptions
    {
        IsIncoming = incoming,
        Memory =
        [
            new RamBlockOptions { Name = "small", SizeBytes = 3 * PageSize }, new RamBlockOptions { Name = "large", SizeBytes = 2 << 20 },
            new RamBlockOptions { Name = "odd", SizeBytes = 65 * PageSize },
        ],
    });
}
