using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Ram;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration;

/// <summary>Pages that were sent before go as deltas (stream 3.4).</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class XbzrleTests
{
    private const int PageSize = RamBlock.PageSize;
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(60);

    [Test]
    public void AFreshPageKeepsItsSlotForTwoPasses()
    {
        using var cache = new XbzrleCache(4 * PageSize, 100);
        cache.Insert(1, 5).Fill(1);
        Assert.That(cache.Insert(5, 6).IsEmpty, "page 1 was used one pass before");
        Assert.That(cache.Find(1, 6)[0], Is.EqualTo(1));
        Assert.That(cache.Insert(5, 7).IsEmpty, "a use makes it fresh again");
        cache.Insert(5, 8).Fill(2);
        Assert.That(cache.Find(1, 8).IsEmpty);
        Assert.That(cache.Find(5, 8)[PageSize - 1], Is.EqualTo(2));
        cache.Insert(6, 8).Fill(3);
        cache.Insert(5, 8).Fill(4);
        Assert.That((cache.Find(5, 8)[0], cache.Find(6, 8)[0]), Is.EqualTo(((byte)4, (byte)3)), "a page replaces itself at any time");
    }

    [TestCase(1UL << 63, 3, 4)]
    [TestCase(4096UL, 1000, 1)]
    [TestCase(1UL << 20, 1000, 256)]
    public void TheCacheHasNoMoreSlotsThanItsSizeOrTheRamAllows(ulong sizeBytes, int ramPages, int slots)
    {
        using var cache = new XbzrleCache(sizeBytes, ramPages);
        for (int page = 0; page < slots; page++) Assert.That(cache.Insert(page, 1).IsEmpty, Is.False);
        Assert.That(cache.Insert(slots, 1).IsEmpty, "the next page shares the first slot");
    }

    [TestCase(64UL << 20)]
    [TestCase(256UL << 10)]
    public async Task RamMovesWhileTheGuestWrites(ulong cacheSizeBytes)
    {
        using TestVm source = TestVm.WithRam(XbzrleMove.SizeBytes).FilledRandom(1, halfZero: true), destination = TestVm.WithRam(XbzrleMove.SizeBytes, incoming: true);
        source.Engine.Parameters = source.Engine.Parameters with { XbzrleCacheSizeBytes = cacheSizeBytes };
        source.Vm.Cont();
        using var writer = new BackgroundWriter(source);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        Task<MigrationStatus> outgoing = XbzrleMove.Begin(source, $"tcp:127.0.0.1:{destination.Engine.Query().SocketAddresses[0].Port}");
        XbzrleMove.FinishAfterDeltas(source);
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{destination.Engine.Query().Error}");
        writer.Dispose();
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
        XbzrleStats stats = source.Engine.Query().Xbzrle!;
        Assert.That(stats.CacheSizeBytes, Is.EqualTo(cacheSizeBytes));
        Assert.That(stats.CacheMisses, Is.GreaterThan(0));
        // The writer changes 512 bytes at the start of a page, so no delta is longer than 519.
        Assert.That(stats.Overflows, Is.Zero);
        Assert.That(stats.Bytes, Is.InRange(1, stats.Pages * 519));
    }

    /// <summary>Each page's way in the second pass, seen in the records: one that is the same, a small change, a new one, one that is zero.</summary>
    [Test]
    public void EachPageGoesTheShortestWay()
    {
        using TestVm vm = TestVm.WithRam(8 * PageSize).FilledRandom(3);
        var figures = new RamFigures((long)vm.Vm.Memory.TotalBytes, new XbzrleFigures(1 << 20));
        using var save = XbzrleSave.For(figures, [vm.Ram])!;
        Assert.That(save.Next(vm.Ram, 0, isZero: false, 1), Is.EqualTo(XbzrleStep.AsUsual), "the first pass does without");
        save.OnEndOfPass();
        Assert.That(save.Next(vm.Ram, 0, isZero: false, 2), Is.EqualTo(XbzrleStep.Copy), "a miss");
        Assert.That(save.Next(vm.Ram, 0, isZero: false, 3), Is.EqualTo(XbzrleStep.Nothing));
        vm.Ram.Slice(100, 1)[0] ^= 1;
        Assert.That(save.Next(vm.Ram, 0, isZero: false, 4), Is.EqualTo(XbzrleStep.Delta));
        new Random(9).NextBytes(vm.Ram.Slice(0, PageSize));
        Assert.That(save.Next(vm.Ram, 0, isZero: false, 5), Is.EqualTo(XbzrleStep.Copy), "an overflow");
        Assert.That(save.Next(vm.Ram, 0, isZero: false, 5), Is.EqualTo(XbzrleStep.Nothing), "the cache has what was sent");
        vm.Ram.Slice(0, PageSize).Clear();
        Assert.That(save.Next(vm.Ram, 0, isZero: true, 6), Is.EqualTo(XbzrleStep.AsUsual));
        vm.Ram.Slice(8, 1)[0] = 1;
        Assert.That(save.Next(vm.Ram, 0, isZero: false, 7), Is.EqualTo(XbzrleStep.Delta), "a change of the zero page");
        save.OnLastStage();
        Assert.That(save.Next(vm.Ram, 1, isZero: false, 8), Is.EqualTo(XbzrleStep.AsUsual), "nothing is kept any more");
        Assert.That((figures.Xbzrle!.Pages, figures.Xbzrle.Misses, figures.Xbzrle.Overflows), Is.EqualTo((5L, 2L, 1L)));
    }

    [Test]
    public void MultifdAndXbzrleExcludeEachOther()
    {
        using TestVm vm = TestVm.WithRam(1 << 20);
        vm.Engine.SetCapabilities([new(MigrationCapability.Xbzrle, true)]);
        Assert.That(() => vm.Engine.SetCapabilities([new(MigrationCapability.Multifd, true)]), Throws.TypeOf<ConfigurationException>().With.Message.EqualTo("Multifd is not compatible with xbzrle"));
        Assert.That(vm.Engine.Capabilities.IsOn(MigrationCapability.Multifd), Is.False);
    }
}
