using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;
using Vmm.Core.Buffers;
using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Core.Memory;

/// <summary>Options of a <see cref="RamBlock"/>.</summary>
public sealed record RamBlockOptions
{
    /// <summary>Block name on the wire, 1 to 255 bytes of ASCII (QEMU: the memory backend's id).</summary>
    public required string Name { get; init; }

    /// <summary>Size, a positive multiple of 4096.</summary>
    public required ulong SizeBytes { get; init; }

    /// <summary>Backing file, created if it does not exist; null for a memfd.</summary>
    public string? FilePath { get; init; }

    /// <summary>The descriptor of this memory from the process that ran the VM before; null to make a new one. The block owns it.</summary>
    public OwnedFd? Inherited { get; init; }

    /// <summary>True for MAP_SHARED, which other processes can map too. A private mapping of a file never writes to the file.</summary>
    public bool IsShared { get; init; } = true;

    /// <summary>True to touch every page at once.</summary>
    public bool Prealloc { get; init; }

    /// <summary>True to advise huge pages, false to advise against them, null to keep the system's setting.</summary>
    public bool? HugePages { get; init; }
}

/// <summary>
/// A named block of guest RAM with pages of 4096 bytes. Any thread may read and write it; marks are atomic. The memory stays mapped until
/// <see cref="Dispose"/>, which the owning <see cref="GuestMemory"/> calls last (QEMU: <c>RAMBlock</c>).
/// </summary>
public sealed unsafe class RamBlock : IDisposable
{
    /// <summary>Page size in the stream.</summary>
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

    /// <summary>True if the memory is mapped with MAP_SHARED.</summary>
    public bool IsShared { get; }

    /// <summary>The backing file's path, or null for a memfd.</summary>
    public string? FilePath { get; }

    /// <summary>Guest-physical address of the first byte.</summary>
    public GuestAddress Address { get; }

    /// <summary>The guest-physical range.</summary>
    public GuestRange Range => new(Address, SizeBytes);

    /// <summary>The memfd or file, for other processes that map the memory (vfio-user, CPR). The block owns it.</summary>
    public OwnedFd Fd { get; }

    /// <summary>
    /// True from the creation of fresh zero memory until somebody gets a writable view of it. While it is true, a load skips zero pages without
    /// touching them.
    /// </summary>
    public bool IsKnownZero { get; private set; }

    /// <summary>Address of the mapping in this process, for the kernel (IOMMU, KVM). Use <see cref="Slice"/> to read or write.</summary>
    public nint HostAddress => (nint)_region.Address;

    /// <summary>Returns a writable view of part of the block. The caller calls <see cref="MarkDirty"/> after each write.</summary>
    /// <param name="offset">Offset in the block, bytes.</param>
    /// <param name="length">Length of the view, bytes.</param>
    /// <returns>The bytes; guest, devices and other threads may change them at any time.</returns>
    /// <exception cref="ArgumentOutOfRangeException">Outside the block.</exception>
    public Span<byte> Slice(ulong offset, int length)
    {
        if (IsKnownZero) IsKnownZero = false;
        return _region.Slice(offset, length);
    }

    /// <summary>Returns a read-only view of part of the block.</summary>
    /// <param name="offset">Offset in the block, bytes.</param>
    /// <param name="length">Length of the view, bytes.</param>
    /// <returns>The bytes; guest, devices and other threads may change them at any time.</returns>
    /// <exception cref="ArgumentOutOfRangeException">Outside the block.</exception>
    public ReadOnlySpan<byte> ReadOnlySlice(ulong offset, int length) => _region.Slice(offset, length);

    /// <summary>Marks the pages of a range in bytes as written if a write log runs. Call it after the write.</summary>
    public void MarkDirty(ulong offset, ulong lengthBytes)
    {
        DirtyBitmap? log = _log;
        if (log is null || lengthBytes == 0) return;
        long first = (long)(offset / PageSize), last = (long)((offset + lengthBytes - 1) / PageSize);
        if (first == last) log.Set(first);
        else log.SetRange(first, last - first + 1);
    }

    /// <summary>Adds a reference to part of the block to a gather list.</summary>
    /// <param name="list">Receives the reference, which is valid until this block is disposed.</param>
    /// <param name="offset">Offset in the block, bytes.</param>
    /// <param name="length">Length of the part, bytes.</param>
    /// <exception cref="ArgumentOutOfRangeException">Outside the block.</exception>
    public void AppendTo(GatherList list, ulong offset, int length)
    {
        ArgumentNullException.ThrowIfNull(list);
        CheckRange(offset, length);
        // SAFETY: the range is inside the mapping, which outlives every migration (GuestMemory disposes blocks after the engine).
        list.AddReference(_region.Address + offset, length);
    }

    /// <summary>As <see cref="AppendTo"/>, for a list that will be filled and not sent.</summary>
    internal void AppendToFill(GatherList list, ulong offset, int length)
    {
        if (IsKnownZero) IsKnownZero = false;
        AppendTo(list, offset, length);
    }

    /// <summary>As <see cref="AppendTo"/>, for a page with an eight-byte record header before it.</summary>
    internal void AppendPageTo(GatherList list, ulong header, long page)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((ulong)page, (ulong)PageCount);
        // SAFETY: the page is inside the mapping, as in AppendTo.
        list.AddRecord(header, _region.Address + ((ulong)page * PageSize), PageSize);
    }

    /// <summary>True if the page of that index holds only zero bytes at this moment; stops at the first vector that is not zero (QEMU: <c>buffer_is_zero</c>).</summary>
    /// <exception cref="ArgumentOutOfRangeException">The block has no such page.</exception>
    public bool IsZeroPage(long page)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((ulong)page, (ulong)PageCount);
        ObjectDisposedException.ThrowIf(_region.IsClosed, this);
        // SAFETY: the page is inside the mapping (checked above).
        byte* p = _region.Address + ((ulong)page * PageSize);
        // Callers ask in page order; the prefetch hides the cache miss of a later page. A prefetch past the end is harmless.
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
    /// Marks the pages that have no backing memory yet; they read as zero, but a read through the mapping would allocate them. The dirty log reports writes
    /// that come after this call.
    /// </summary>
    /// <param name="into">One bit for each page; this call adds marks.</param>
    public void FindHoles(DirtyBitmap into)
    {
        ArgumentNullException.ThrowIfNull(into);
        long size = (long)SizeBytes;
        for (long at = 0; at < size;)
        {
            long data = Posix.SeekData(Fd, at);
            if (data == -2) return;
            long end = data < 0 ? size : Math.Min(data, size);
            long first = (at + PageSize - 1) / PageSize, last = end / PageSize;
            if (last > first && IsShared) into.SetRange(first, last - first);
            else if (last > first) FindUncopied(first, last, into);
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

    /// <summary>A private mapping keeps its written pages beside the file, so a hole of the file is one of the block only where no page was written.</summary>
    private void FindUncopied(long first, long last, DirtyBitmap into)
    {
        using OwnedFd? map = Posix.Open("/proc/self/pagemap", Posix.O_RDONLY, 0, out _);
        if (map is null) return;
        byte[] entries = new byte[8 * 4096];
        for (long page = first; page < last;)
        {
            int count = (int)Math.Min(entries.Length / 8, last - page);
            if (Posix.PRead(map, entries.AsSpan(0, 8 * count), ((HostAddress / PageSize) + page) * 8, out _) != 8 * count) return;
            // Bits 63 and 62: the page is present, or swapped. Bit 61: it is the file's, which somebody has only read.
            for (int i = 0; i < count; i++)
                if (BitConverter.ToUInt64(entries, 8 * i) >> 61 is 0 or 5) into.Set(page + i);
            page += count;
        }
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

    /// <summary>Checks the length of the descriptor, because an access to a mapping past the end of its file ends the process.</summary>
    private static OwnedFd Inherited(RamBlockOptions options, OwnedFd fd)
    {
        Errno errno = Posix.Stat(fd, out FileStatus stat);
        // A user's file may be larger than the block; a memfd has exactly its size.
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
        // A process that receives the descriptor could otherwise shrink the memfd, and the next access here would end this process.
        if (errno == Errno.None && path is null) errno = Posix.SealSize(fd);
        if (errno == Errno.None) return fd;
        fd.Dispose();
        throw Posix.Error($"RAM block '{options.Name}': cannot size {path ?? "memfd"} to {options.SizeBytes} bytes", errno);
    }
}
