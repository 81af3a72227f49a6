using System.Numerics;

namespace Vmm.Core.Memory;

/// <summary>
/// One bit a page, atomic per 64-page word. Any thread may mark; harvesting exchanges whole words, so a mark is either in this harvest or in
/// the next, never lost. A writer marks after it has written (QEMU: ramblock dirty bitmap, <c>bmap</c>).
/// </summary>
public sealed class DirtyBitmap
{
    private readonly ulong[] _words;

    /// <summary>Makes a clear bitmap.</summary>
    /// <param name="pages">Number of pages.</param>
    public DirtyBitmap(long pages)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(pages);
        PageCount = pages;
        _words = new ulong[(pages + 63) / 64];
    }

    /// <summary>Number of pages covered.</summary>
    public long PageCount { get; }

    /// <summary>Number of 64-page words.</summary>
    public int WordCount => _words.Length;

    /// <summary>Marks one page.</summary>
    /// <param name="page">Page index.</param>
    /// <returns>True if it was clear before.</returns>
    public bool Set(long page)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((ulong)page, (ulong)PageCount);
        ulong bit = 1UL << (int)(page & 63);
        ref ulong word = ref _words[page >> 6];
        // Most marks hit a page that is dirty already; a plain read first avoids a locked instruction and a cache-line steal.
        if ((Volatile.Read(ref word) & bit) != 0) return false;
        return (Interlocked.Or(ref word, bit) & bit) == 0;
    }

    /// <summary>Marks a run of pages.</summary>
    /// <param name="firstPage">First page.</param>
    /// <param name="pages">Number of pages.</param>
    public void SetRange(long firstPage, long pages)
    {
        if (firstPage < 0 || pages < 0 || firstPage > PageCount - pages) throw new ArgumentOutOfRangeException(nameof(firstPage));
        long end = firstPage + pages;
        for (long page = firstPage; page < end;)
        {
            int low = (int)(page & 63);
            int n = (int)Math.Min(64 - low, end - page);
            ulong mask = n == 64 ? ulong.MaxValue : ((1UL << n) - 1) << low;
            Interlocked.Or(ref _words[page >> 6], mask);
            page += n;
        }
    }

    /// <summary>True if the page is marked.</summary>
    /// <param name="page">Page index.</param>
    /// <returns>The bit.</returns>
    public bool IsSet(long page)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((ulong)page, (ulong)PageCount);
        return (Volatile.Read(ref _words[page >> 6]) & (1UL << (int)(page & 63))) != 0;
    }

    /// <summary>Clears one page's mark.</summary>
    /// <param name="page">Page index.</param>
    /// <returns>True if it was marked.</returns>
    public bool TestAndClear(long page)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((ulong)page, (ulong)PageCount);
        ulong bit = 1UL << (int)(page & 63);
        ref ulong word = ref _words[page >> 6];
        if ((Volatile.Read(ref word) & bit) == 0) return false;
        return (Interlocked.And(ref word, ~bit) & bit) != 0;
    }

    /// <summary>Marks all pages.</summary>
    public void SetAll()
    {
        if (PageCount > 0) SetRange(0, PageCount);
    }

    /// <summary>Takes and clears the marks of 64 pages at once.</summary>
    /// <param name="word">Word index.</param>
    /// <returns>The marks taken.</returns>
    public ulong TakeWord(int word) => Volatile.Read(ref _words[word]) == 0 ? 0 : Interlocked.Exchange(ref _words[word], 0);

    /// <summary>Adds marks to 64 pages at once.</summary>
    /// <param name="word">Word index.</param>
    /// <param name="marks">Bits to set; bits past the last page are dropped.</param>
    /// <returns>How many pages became marked.</returns>
    public int OrWord(int word, ulong marks)
    {
        if (word == _words.Length - 1 && (PageCount & 63) != 0) marks &= (1UL << (int)(PageCount & 63)) - 1;
        if (marks == 0) return 0;
        return BitOperations.PopCount(marks & ~Interlocked.Or(ref _words[word], marks));
    }

    /// <summary>Moves all marks into another bitmap of the same size, clearing them here.</summary>
    /// <param name="target">Receives the marks.</param>
    /// <returns>How many pages became marked in <paramref name="target"/>.</returns>
    public long HarvestInto(DirtyBitmap target)
    {
        ArgumentNullException.ThrowIfNull(target);
        if (target.PageCount != PageCount) throw new ArgumentException($"bitmap of {target.PageCount} pages, expected {PageCount}", nameof(target));
        long added = 0;
        for (int i = 0; i < _words.Length; i++)
        {
            ulong marks = TakeWord(i);
            if (marks != 0) added += target.OrWord(i, marks);
        }
        return added;
    }

    /// <summary>Number of marked pages.</summary>
    /// <returns>A count; exact only while nobody marks.</returns>
    public long Count()
    {
        long n = 0;
        for (int i = 0; i < _words.Length; i++) n += BitOperations.PopCount(Volatile.Read(ref _words[i]));
        return n;
    }

    /// <summary>First marked page at or after <paramref name="page"/>.</summary>
    /// <param name="page">Where to start.</param>
    /// <returns>The page, or <see cref="PageCount"/>.</returns>
    public long FindNext(long page)
    {
        if (page >= PageCount) return PageCount;
        int word = (int)(page >> 6);
        ulong marks = Volatile.Read(ref _words[word]) & (ulong.MaxValue << (int)(page & 63));
        while (marks == 0)
        {
            if (++word >= _words.Length) return PageCount;
            marks = Volatile.Read(ref _words[word]);
        }
        return Math.Min(PageCount, ((long)word << 6) + BitOperations.TrailingZeroCount(marks));
    }
}
