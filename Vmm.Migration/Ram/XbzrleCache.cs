using System.Numerics;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;

namespace Vmm.Migration.Ram;

/// <summary>
/// Copies of pages as the destination has them. Each page has one slot, by its place in RAM; a page that was used in this pass or the one before keeps
/// the slot. The kernel gives a slot its memory when it is first used. One thread (QEMU: <c>PageCache</c>).
/// </summary>
internal sealed class XbzrleCache : IDisposable
{
    private const int PageSize = RamBlock.PageSize;

    /// <summary>A page that was used so many passes ago gives way to another one.</summary>
    private const int LifetimePasses = 2;

    private readonly long[] _pages;
    private readonly long[] _passes;
    private readonly MappedRegion _slots;

    /// <summary>Makes an empty cache.</summary>
    /// <param name="sizeBytes">Bytes of pages that it may keep, a power of two.</param>
    /// <param name="ramPages">Pages of RAM, for which it never has more slots than needed.</param>
    /// <exception cref="ChannelException">The kernel could not provide the memory.</exception>
    internal XbzrleCache(ulong sizeBytes, long ramPages)
    {
        ulong slots = Math.Min(Math.Max(sizeBytes / PageSize, 1), BitOperations.RoundUpToPowerOf2((ulong)Math.Max(ramPages, 1)));
        using OwnedFd fd = Posix.MemFd("vmm-xbzrle");
        Errno errno = Posix.Truncate(fd, (long)slots * PageSize);
        if (errno != Errno.None) throw Posix.Error($"cannot size the xbzrle cache to {slots * PageSize} bytes", errno);
        _slots = MappedRegion.Map(fd, slots * PageSize, shared: true, 0, "the xbzrle cache");
        _pages = new long[slots];
        _passes = new long[slots];
        Array.Fill(_pages, -1);
    }

    /// <summary>Finds the copy of a page and notes its use.</summary>
    /// <returns>The copy, which the caller may change; empty if there is none.</returns>
    internal Span<byte> Find(long page, long pass)
    {
        long slot = SlotOf(page);
        if (_pages[slot] != page) return default;
        _passes[slot] = pass;
        return Bytes(slot);
    }

    /// <summary>Takes a page's slot for it.</summary>
    /// <returns>Where the caller puts the copy at once; empty if the slot keeps another page.</returns>
    internal Span<byte> Insert(long page, long pass)
    {
        long slot = SlotOf(page);
        if (_pages[slot] != -1 && _pages[slot] != page && _passes[slot] + LifetimePasses > pass) return default;
        (_pages[slot], _passes[slot]) = (page, pass);
        return Bytes(slot);
    }

    public void Dispose() => _slots.Dispose();

    private long SlotOf(long page) => page & (_pages.LongLength - 1);

    private Span<byte> Bytes(long slot) => _slots.Slice((ulong)slot * PageSize, PageSize);
}
