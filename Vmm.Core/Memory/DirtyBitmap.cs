using System.Numerics;

namespace Vmm.Core.Memory;

/// <summary>
/// One bit for each page, atomic in words of 64 pages. Any thread may set marks. A harvest exchanges whole words, so a mark is in this harvest or in
/// the next one and never lost. A thread marks a page after it has written it. Pages count from 0; a page that the bitmap does not have throws
/// <see cref="ArgumentOutOfRangeException"/> (QEMU: ramblock dirty bitmap, <c>bmap</c>).
/// </summary>
public sealed class DirtyBitmap
{
    private readonly ulong[] _words;

    /// <summary>Makes a bitmap without marks.</summary>
    public DirtyBitmap(long pages)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(pages);
        PageCount = pages;
        _words = new ulong[(pages + 63) / 64];
    }

    /// <summary>Number of pages.</summary>
    public long PageCount { get; }

    /// <summary>Number of 64-page words.</summary>
    public int WordCount => _words.Length;

    /// <summary>Marks one page.</summary>
    /// <returns>True if the page was not marked before.</returns>
    public bool Set(long page)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((ulong)page, (ulong)PageCount);
        ulong bit = 1UL << (int)(page & 63);
        ref ulong word = ref _words[page >> 6];
        // Most pages are marked already; a plain read first saves the locked instruction and leaves the cache line shared.
        if ((Volatile.Read(ref word) & bit) != 0) return false;
        return (Interlocked.Or(ref word, bit) & bit) == 0;
    }

    /// <summary>Marks <paramref name="pages"/> pages from <paramref name="firstPage"/> on.</summary>
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

    /// <summary>Tells whether a page is marked.</summary>
    public bool IsSet(long page)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((ulong)page, (ulong)PageCount);
        return (Volatile.Read(ref _words[page >> 6]) & (1UL << (int)(page & 63))) != 0;
    }

    /// <summary>Clears the mark of one page.</summary>
    /// <returns>True if the page was marked.</returns>
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

    /// <summary>Returns and clears the marks of 64 pages at once; <paramref name="word"/> is first page / 64, bit 0 the first page.</summary>
    public ulong TakeWord(int word) => Volatile.Read(ref _words[word]) == 0 ? 0 : Interlocked.Exchange(ref _words[word], 0);

    /// <summary>Adds marks to 64 pages at once.</summary>
    /// <param name="word">Index of the word: first page / 64.</param>
    /// <param name="marks">Bits to set; bits after the last page are dropped.</param>
    /// <returns>Number of pages that this call marked.</returns>
    public int OrWord(int word, ulong marks)
    {
        if (word == _words.Length - 1 && (PageCount & 63) != 0) marks &= (1UL << (int)(PageCount & 63)) - 1;
        if (marks == 0) return 0;
        return BitOperations.PopCount(marks & ~Interlocked.Or(ref _words[word], marks));
    }

    /// <summary>Moves all marks into another bitmap of the same size.</summary>
    /// <param name="target">Receives the marks.</param>
    /// <returns>Number of pages that this call marked in <paramref name="target"/>.</returns>
    /// <exception cref="ArgumentException">The target has another number of pages.</exception>
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

    /// <summary>Counts the marked pages.</summary>
    /// <returns>The count; exact only while no thread sets or clears marks.</returns>
    public long Count()
    {
        long n = 0;
        for (int i = 0; i < _words.Length; i++) n += BitOperations.PopCount(Volatile.Read(ref _words[i]));
        return n;
    }

    /// <summary>Finds the first marked page at or after <paramref name="page"/>.</summary>
    /// <param name="page">Where to start.</param>
    /// <returns>The page; <see cref="PageCount"/> if none is marked.</returns>
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
