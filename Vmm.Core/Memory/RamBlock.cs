using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;
using Vmm.Core.Buffers;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Core.Memory;

/// <summary>How to make a <see cref="RamBlock"/>.</summary>
public sealed record RamBlockOptions
{
    /// <summary>Block name on the wire, 1 to 255 bytes of ASCII (QEMU: the memory backend's id).</summary>
    public required string Name { get; init; }

    /// <summary>Size, a positive multiple of 4096.</summary>
    public required ulong SizeBytes { get; init; }

    /// <summary>Backing file, created when missing; null for a memfd.</summary>
    public string? FilePath { get; init; }

    /// <summary>A descriptor to map instead of making one, from the process that had this memory before; owned by the block from here on.</summary>
    public OwnedFd? Inherited { get; init; }

    /// <summary>MAP_SHARED: other processes see the memory. A private file mapping never writes to the file.</summary>
    public bool IsShared { get; init; } = true;

    /// <summary>Touch every page now.</summary>
    public bool Prealloc { get; init; }

    /// <summary>Advise huge pages; null leaves the system's setting.</summary>
    public bool? HugePages { get; init; }
}

/// <summary>
/// One named block of guest RAM, page size 4096. Thread-safe: any thread may read and write; marks are atomic. The memory stays mapped until
/// <see cref="Dispose"/>, which the owning <see cref="GuestMemory"/> calls last (QEMU: <c>RAMBlock</c>).
/// </summary>
public sealed unsafe class RamBlock : IDisposable
{
    /// <summary>Target page size of the stream.</summary>
    public const int PageSize = 4096;

    private readonly MappedRegion _region;
    private volatile DirtyBitmap? _log;

    internal RamBlock(RamBlockOptions options, GuestAddress address)
    {
        if (options.Name.Length is 0 or > 255 || options.Name.Any(static c => c is < ' ' or > '~'))
            throw new ConfigurationException($"RAM block name '{options.Name}' must be 1 to 255 printable ASCII characters");
        if (options.SizeBytes == 0 || options.SizeBytes % PageSize != 0)
            throw new ConfigurationException($"RAM block '{options.Name}': size {options.SizeBytes} is not a positive multiple of {PageSize}");
        Name = options.Name;
        SizeBytes = options.SizeBytes;
        IsShared = options.IsShared;
        FilePath = options.FilePath;
        Address = address;
        Fd = OpenBacking(options, out bool fresh);
        try
        {
            _region = MappedRegion.Map(Fd, SizeBytes, IsShared, 0, $"RAM block '{Name}'");
        }
        catch
        {
            Fd.Dispose();
            throw;
        }
        IsKnownZero = fresh;
        if (options.HugePages is { } huge) _region.AdviseHugePages(huge);
        if (options.Prealloc) _region.Populate();
    }

    /// <summary>Name on the wire.</summary>
    public string Name { get; }

    /// <summary>Size in bytes (QEMU: <c>used_length</c>).</summary>
    public ulong SizeBytes { get; }

    /// <summary>Size in pages.</summary>
    public long PageCount => (long)(SizeBytes / PageSize);

    /// <summary>MAP_SHARED.</summary>
    public bool IsShared { get; }

    /// <summary>The backing file's path, or null for a memfd.</summary>
    public string? FilePath { get; }

    /// <summary>Guest-physical address of the first byte.</summary>
    public GuestAddress Address { get; }

    /// <summary>The guest-physical range.</summary>
    public GuestRange Range => new(Address, SizeBytes);

    /// <summary>The memfd or file, for mapping elsewhere (another process, CPR). Owned by this block.</summary>
    public OwnedFd Fd { get; }

    /// <summary>
    /// True while nothing has been written since the block was made from fresh zero memory; lets a load skip zero pages without touching
    /// them. Whoever hands out writable memory clears it.
    /// </summary>
    public bool IsKnownZero { get; private set; }

    /// <summary>Where the block is mapped in this process, to be told to the kernel (IOMMU, KVM), which takes addresses. Use <see cref="Slice"/> to read or write.</summary>
    public nint HostAddress => (nint)_region.Address;

    /// <summary>Writable view of part of the block. The caller must <see cref="MarkDirty"/> what it wrote, after writing it.</summary>
    /// <param name="offset">Offset in the block.</param>
    /// <param name="length">Bytes.</param>
    /// <returns>The bytes; others may change them at any time.</returns>
    /// <exception cref="ArgumentOutOfRangeException">Outside the block.</exception>
    public Span<byte> Slice(ulong offset, int length)
    {
        if (IsKnownZero) IsKnownZero = false;
        return _region.Slice(offset, length);
    }

    /// <summary>Read-only view of part of the block.</summary>
    /// <param name="offset">Offset in the block.</param>
    /// <param name="length">Bytes.</param>
    /// <returns>The bytes; others may change them at any time.</returns>
    /// <exception cref="ArgumentOutOfRangeException">Outside the block.</exception>
    public ReadOnlySpan<byte> ReadOnlySlice(ulong offset, int length) => _region.Slice(offset, length);

    /// <summary>Marks pages as written while a log runs; call after the write.</summary>
    /// <param name="offset">First byte written.</param>
    /// <param name="lengthBytes">Bytes written.</param>
    public void MarkDirty(ulong offset, ulong lengthBytes)
    {
        DirtyBitmap? log = _log;
        if (log is null || lengthBytes == 0) return;
        long first = (long)(offset / PageSize), last = (long)((offset + lengthBytes - 1) / PageSize);
        if (first == last) log.Set(first);
        else log.SetRange(first, last - first + 1);
    }

    /// <summary>Adds part of the block to a gather list without copying.</summary>
    /// <param name="list">Receives the reference; valid until this block is disposed.</param>
    /// <param name="offset">Offset in the block.</param>
    /// <param name="length">Bytes.</param>
    public void AppendTo(GatherList list, ulong offset, int length)
    {
        ArgumentNullException.ThrowIfNull(list);
        CheckRange(offset, length);
        // SAFETY: the range is inside the mapping, which outlives every migration (GuestMemory disposes blocks after the engine).
        list.AddReference(_region.Address + offset, length);
    }

    /// <summary>Adds an eight-byte record header and one page behind it, as <see cref="AppendTo"/>.</summary>
    internal void AppendPageTo(GatherList list, ulong header, long page)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((ulong)page, (ulong)PageCount);
        // SAFETY: the page is inside the mapping, as in AppendTo.
        list.AddRecord(header, _region.Address + ((ulong)page * PageSize), PageSize);
    }

    /// <summary>True if the page holds only zero bytes; SIMD, leaves at the first non-zero vector (QEMU: <c>buffer_is_zero</c>).</summary>
    /// <param name="page">Page index.</param>
    /// <returns>The verdict at this moment.</returns>
    public bool IsZeroPage(long page)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((ulong)page, (ulong)PageCount);
        ObjectDisposedException.ThrowIf(_region.IsClosed, this);
        // SAFETY: the page is inside the mapping (checked above).
        byte* p = _region.Address + ((ulong)page * PageSize);
        // Pages are asked about in order; the first look at each would be a cache miss that nothing overlaps. A prefetch past the end is harmless.
        if (Sse.IsSupported) Sse.Prefetch0(p + (4 * PageSize));
        if (*(ulong*)p != 0 || *(ulong*)(p + 2040) != 0 || *(ulong*)(p + PageSize - 8) != 0) return false;
        for (int i = 0; i < PageSize; i += 256)
        {
            Vector512<byte> any = Vector512.Load(p + i) | Vector512.Load(p + i + 64) | Vector512.Load(p + i + 128) | Vector512.Load(p + i + 192);
            if (any != Vector512<byte>.Zero) return false;
        }
        return true;
    }

    /// <summary>
    /// Marks the pages that have no backing memory yet: they read as zero, and looking at them through the mapping would allocate them. Only
    /// for shared blocks, whose file is what the guest sees; what is written later is the dirty log's to tell.
    /// </summary>
    /// <param name="into">One bit a page; marks are added.</param>
    public void FindHoles(DirtyBitmap into)
    {
        ArgumentNullException.ThrowIfNull(into);
        if (!IsShared) return;
        long size = (long)SizeBytes;
        for (long at = 0; at < size;)
        {
            long data = Posix.SeekData(Fd, at);
            if (data == -2) return;
            long end = data < 0 ? size : Math.Min(data, size);
            long first = (at + PageSize - 1) / PageSize, last = end / PageSize;
            if (last > first) into.SetRange(first, last - first);
            if (data < 0 || data >= size) return;
            at = Posix.SeekHole(Fd, data);
            if (at < 0) return;
        }
    }

    /// <summary>Starts or stops the software write log.</summary>
    internal void SetLog(DirtyBitmap? log) => _log = log;

    /// <summary>Harvests the software write log.</summary>
    internal void HarvestLog(DirtyBitmap into) => _log?.HarvestInto(into);

    /// <summary>Unmaps the block and closes its descriptor.</summary>
    public void Dispose()
    {
        _region.Dispose();
        Fd.Dispose();
    }

    private void CheckRange(ulong offset, int length)
    {
        if (length < 0 || offset > SizeBytes || (ulong)length > SizeBytes - offset)
            throw new ArgumentOutOfRangeException(nameof(offset), $"range 0x{offset:x}+0x{length:x} is outside RAM block '{Name}' of 0x{SizeBytes:x} bytes");
    }

    private static OwnedFd OpenBacking(RamBlockOptions options, out bool fresh)
    {
        fresh = true;
        if (options.Inherited is not null)
        {
            fresh = false;
            return Inherited(options, options.Inherited);
        }
        if (options.FilePath is null)
        {
            return Sized(Posix.MemFd($"vmm-ram-{options.Name}"), options, null);
        }
        OwnedFd fd = Posix.Open(options.FilePath, Posix.O_RDWR | Posix.O_CREAT, 0x180 /* 0600 */, out Errno errno)
            ?? throw Posix.Error($"RAM block '{options.Name}': cannot open '{options.FilePath}'", errno);
        Posix.Stat(fd, out FileStatus stat);
        fresh = stat.SizeBytes == 0;
        if (stat.SizeBytes == 0) return Sized(fd, options, options.FilePath);
        if ((ulong)stat.SizeBytes >= options.SizeBytes) return fd;
        fd.Dispose();
        throw new ConfigurationException($"RAM block '{options.Name}': file '{options.FilePath}' has {stat.SizeBytes} bytes, {options.SizeBytes} are needed");
    }

    /// <summary>A mapping past the end of a file would end this process at the first touch.</summary>
    private static OwnedFd Inherited(RamBlockOptions options, OwnedFd fd)
    {
        Errno errno = Posix.Stat(fd, out FileStatus stat);
        // A file of the user's may be larger than the block; a memfd was made for it.
        bool fits = options.FilePath is null ? (ulong)stat.SizeBytes == options.SizeBytes : (ulong)stat.SizeBytes >= options.SizeBytes;
        if (errno == Errno.None && fits) return fd;
        fd.Dispose();
        throw errno != Errno.None
            ? Posix.Error($"RAM block '{options.Name}': inherited descriptor", errno)
            : new ConfigurationException($"RAM block '{options.Name}': the inherited memory has {stat.SizeBytes} bytes, {options.SizeBytes} are configured");
    }

    private static OwnedFd Sized(OwnedFd fd, RamBlockOptions options, string? path)
    {
        Errno errno = Posix.Truncate(fd, (long)options.SizeBytes);
        // Another process that is given the descriptor could shrink the file, and our next touch would end this process.
        if (errno == Errno.None && path is null) errno = Posix.SealSize(fd);
        if (errno == Errno.None) return fd;
        fd.Dispose();
        throw Posix.Error($"RAM block '{options.Name}': cannot size {path ?? "memfd"} to {options.SizeBytes} bytes", errno);
    }
}
