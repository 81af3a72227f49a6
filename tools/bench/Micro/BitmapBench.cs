using BenchmarkDotNet.Attributes;
using Vmm.Core.Memory;

namespace Vmm.Tools.Bench.Micro;

/// <summary>The harvest of dirty marks of 8 GiB, and the count that follows it. The marks go from one bitmap to the other and back.</summary>
public class BitmapBench
{
    private const long Pages = 2 << 20;
    private readonly DirtyBitmap _one = new(Pages), _other = new(Pages);
    private bool _isBack;

    /// <summary>Marked pages in a thousand.</summary>
    [Params(0, 1, 500)]
    public int PerMille { get; set; }

    [GlobalSetup]
    public void Setup()
    {
        var random = new Random(1);
        for (long page = 0; page < Pages; page++)
            if (random.Next(1000) < PerMille) _one.Set(page);
    }

    [Benchmark]
    public long HarvestInto()
    {
        _isBack = !_isBack;
        return _isBack ? _one.HarvestInto(_other) : _other.HarvestInto(_one);
    }

    [Benchmark]
    public long Count() => _one.Count();
}
