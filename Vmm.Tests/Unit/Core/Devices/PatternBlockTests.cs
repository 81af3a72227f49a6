using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.Workloads;

namespace Vmm.Tests.Unit.Core.Devices;

/// <summary>The pattern that the workload keeps in RAM reveals and names every page that a migration loses, tears or mixes up.</summary>
[TestFixture]
public sealed class PatternBlockTests
{
    private const int Pages = 1100; // 2 index pages
    private const int Data = Pages - 3;

    private GuestMemory _memory = null!;
    private RamBlock _ram = null!;
    private PatternBlock _block = null!;

    [SetUp]
    public void SetUp()
    {
        _memory = new GuestMemory();
        _ram = _memory.AddBlock(new RamBlockOptions { Name = "m", SizeBytes = Pages * 4096 });
        _block = new PatternBlock(_ram);
        _block.Format(seed: 7, prefill: false);
        for (int i = 0; i < 4000; i++) Assert.That(_block.Rewrite(i * 13 % Data), Is.Null);
    }

    [TearDown]
    public void TearDown() => _memory.Dispose();

    [TestCase(3, 1)]
    [TestCase(1024, 1022)]
    [TestCase(1025, 1022)]
    [TestCase(1026, 1023)]
    [TestCase(Pages, Data)]
    public void EveryDataPageHasAnIndexEntry(int pages, int data)
    {
        using var memory = new GuestMemory();
        Assert.That(PatternBlock.DataPagesOf(memory.AddBlock(new RamBlockOptions { Name = "x", SizeBytes = (ulong)pages * 4096 })), Is.EqualTo(data));
    }

    [Test]
    public void WhatWasWrittenIsFoundGoodByAnotherReader() => Assert.That(Scan(), Is.EqualTo((0L, (string?)null)));

    [Test]
    public void OneLostPageIsNamed()
    {
        byte[] old = Page(500);
        _block.Rewrite(500);
        Put(500, old);
        Assert.That(Scan(), Is.EqualTo((1L, "RAM block 'm' page 500: expected generation 5, found generation 4, whole")));
        Assert.That(_block.Rewrite(500)!.Page, Is.EqualTo(500));
        Assert.That(Scan().Bad, Is.EqualTo(1), "a rewrite leaves a bad page as it is");
    }

    [Test]
    public void ATornPageIsNamedWithTheByteWhereItTears([Values(8, 2048, 4088)] int keptBytes)
    {
        byte[] old = Page(77);
        _block.Rewrite(77);
        byte[] torn = [.. Page(77).AsSpan(0, keptBytes), .. old.AsSpan(keptBytes)];
        Put(77, torn);
        (long bad, string? first) = Scan();
        Assert.That(bad, Is.EqualTo(1));
        if (keptBytes > 32) Assert.That(first, Does.Contain($"a torn page: generation 5 up to byte {keptBytes}, then generation 4"));
        else Assert.That(first, Does.Contain("page 77"));
    }

    [Test]
    public void AFlippedBitIsNamed()
    {
        _ram.Slice((42 * 4096) + 1001, 1)[0] ^= 0x10;
        Assert.That(Scan().First, Does.Contain("page 42").And.Contain("wrong bytes from byte 1000 on"));
    }

    [Test]
    public void AZeroedPageAndAPageInTheWrongPlaceAreNamed()
    {
        byte[] other = Page(9);
        Put(10, other);
        _ram.Slice(11 * 4096, 4096).Clear();
        (long bad, string? first) = Scan();
        Assert.That((bad, first), Is.EqualTo((2L, "RAM block 'm' page 10: expected generation 3, found page 9 of this block")));
    }

    [Test]
    public void ALostIndexPageIsFoundThroughItsDataPages()
    {
        byte[] old = Page(Data);
        _block.Rewrite(3);
        Put(Data, old);
        // The index disagrees with the root, and page 3 disagrees with the index.
        Assert.That(Scan(), Is.EqualTo((2L, $"RAM block 'm' page {Pages - 1}: expected 4001 writes with checksum 0x{_block.Root.Generations:x16} as in the root, "
            + $"found 4000 writes with checksum 0x{_block.Root.Generations - PatternPage.Checksum(3, 5) + PatternPage.Checksum(3, 4):x16} in the index")));
        _ram.Slice(Data * 4096, 4096).Clear();
        Assert.That(Scan().First, Is.EqualTo($"RAM block 'm' page {Data}: expected index page 0 of the workload, found something else"));
    }

    [Test]
    public void APageLostTogetherWithItsIndexEntryBreaksTheRoot()
    {
        byte[] page = Page(3), index = Page(Data);
        _block.Rewrite(3);
        Put(3, page);
        Put(Data, index);
        Assert.That(Scan().First, Does.StartWith($"RAM block 'm' page {Pages - 1}: expected 4001 writes").And.Contain("found 4000 writes"));
    }

    [Test]
    public void ALostRootIsNotTakenForNewMemory()
    {
        _ram.Slice((Pages - 1) * 4096, 4096).Clear();
        var reader = new PatternBlock(_ram);
        Assert.That((reader.TryAttach(), reader.HasIndex()), Is.EqualTo((false, true)));
    }

    [Test]
    public void APageThatWasNeverWrittenMustStayZeroInNewMemory()
    {
        RamBlock fresh = _memory.AddBlock(new RamBlockOptions { Name = "n", SizeBytes = 16 * 4096 });
        var block = new PatternBlock(fresh);
        block.Format(1, prefill: false);
        fresh.Slice(5 * 4096, 1)[0] = 1;
        Assert.That(block.Check(5)!.ToString(), Does.StartWith("RAM block 'n' page 5: expected a zero page, never written, found no pattern"));

        RamBlock used = _memory.AddBlock(new RamBlockOptions { Name = "o", SizeBytes = 16 * 4096 });
        used.Slice(5 * 4096, 1)[0] = 1;
        block = new PatternBlock(used);
        block.Format(1, prefill: false);
        Assert.That(block.Check(5), Is.Null, "Format accepts the unknown content of a page");
    }

    [Test]
    public void EveryWriteIsLogged()
    {
        _memory.StartDirtyLog();
        var marks = new DirtyBitmap(Pages);
        _block.Rewrite(1090);
        _memory.HarvestDirtyLog(_ram, marks);
        _memory.StopDirtyLog();
        Assert.That((marks.Count(), marks.IsSet(1090), marks.IsSet(Data + 1), marks.IsSet(Pages - 1)), Is.EqualTo((3L, true, true, true)));
    }

    [Test]
    public void AWriteAllocatesNothing()
    {
        _block.Rewrite(0);
        long before = GC.GetAllocatedBytesForCurrentThread();
        for (int i = 0; i < 1000; i++) _block.Rewrite(i);
        Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.Zero);
    }

    private byte[] Page(int page) => _ram.ReadOnlySlice((ulong)page * 4096, 4096).ToArray();

    private void Put(int page, byte[] content) => content.CopyTo(_ram.Slice((ulong)page * 4096, 4096));

    /// <summary>Verifies the block with a new reader, which knows only what RAM holds.</summary>
    private (long Bad, string? First) Scan()
    {
        var reader = new PatternBlock(_ram);
        Assert.That(reader.TryAttach());
        long bad = 0;
        WorkloadViolation? first = reader.CheckIndex(ref bad);
        for (int page = 0; page < Data; page++)
        {
            if (reader.Check(page) is not { } violation) continue;
            bad++;
            first ??= violation;
        }
        return (bad, first?.ToString());
    }
}
