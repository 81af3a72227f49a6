using System.Diagnostics.CodeAnalysis;
using BenchmarkDotNet.Attributes;
using Vmm.Core.Memory;

namespace Vmm.Tools.Bench.Micro;

/// <summary>The scan for zero pages, over more memory than a cache holds. One operation is one page.</summary>
[SuppressMessage("Design", "CA1001", Justification = "BenchmarkDotNet calls Cleanup")]
public class ZeroScanBench
{
    private const int Pages = 32768;
    private GuestMemory _memory = null!;
    private RamBlock _block = null!;

    /// <summary>What the pages hold: the first word of a random page ends its scan, the last word of an almost zero page.</summary>
    [Params("zero", "random", "last-word")]
    public string Content { get; set; } = "zero";

    [GlobalSetup]
    public void Setup()
    {
        _memory = new GuestMemory();
        _block = _memory.AddBlock(new RamBlockOptions { Name = "m", SizeBytes = (ulong)Pages * RamBlock.PageSize, Prealloc = true });
        for (ulong page = 0; page < Pages; page++)
        {
            Span<byte> bytes = _block.Slice(page * RamBlock.PageSize, RamBlock.PageSize);
            if (Content == "random") Random.Shared.NextBytes(bytes);
            else if (Content == "last-word") bytes[^1] = 1;
        }
    }

    [GlobalCleanup]
    public void Cleanup() => _memory.Dispose();

    [Benchmark(OperationsPerInvoke = Pages)]
    public int IsZeroPage()
    {
        int zero = 0;
        for (long page = 0; page < Pages; page++)
            if (_block.IsZeroPage(page)) zero++;
        return zero;
    }
}
