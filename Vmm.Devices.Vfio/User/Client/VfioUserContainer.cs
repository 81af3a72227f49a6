using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>
/// The DMA address space of one vfio-user server (vfio-user 3.8 to 3.10): maps guest RAM with each block's descriptor, and serves the
/// server's DMA messages from the same map. BQL: held, but for the DMA itself, which runs on a receiver thread.
/// </summary>
internal sealed class VfioUserContainer(string name) : IVfioContainer, IVfioUserDma
{
    private const int PipelineDepth = 16;

    private readonly Lock _dmaGate = new();
    private VfioUserMapping[] _maps = [];
    private List<VfioUserMapping>? _collected;
    private VfioUserClient? _client;
    private VfioUserFeatures? _features;
    private IDisposable? _registration;
    private ulong _maxMapBytes;
    private volatile bool _busMaster;

    /// <inheritdoc/>
    public string Name => name;

    /// <summary>The mapped pieces, ascending by address.</summary>
    internal IReadOnlyList<VfioUserMapping> Mappings => _maps;

    /// <summary>
    /// Whether all DMA writes are logged here: either they all come as messages, which mark the pages, or the server is of the v1 era and logs them
    /// with DIRTY_PAGES (vfio-user 8.5, 9). A server with DMA logging (feature 6) logs as a device, not here.
    /// </summary>
    public bool CanLogDirty => LogsByMessages || IsV1;

    /// <inheritdoc/>
    public ulong MaxDirtyBitmapBytes => CanLogDirty ? _client?.Server.Migration?.MaxBitmapBytes ?? VfioUserLimits.BitmapBytes : 0;

    /// <summary>True when the server can write to RAM by messages only.</summary>
    internal bool LogsByMessages => !Array.Exists(_maps, static m => m.IsWritableByFd);

    private bool IsV1 => _client?.Server.Migration is { } migration && migration.PageSizeBytes is null or VfioUserLimits.PageBytes
        && _features is { } f && !f.Knows(VfioDeviceFeature.Migration) && !f.Knows(VfioDeviceFeature.DmaLoggingStart);

    /// <summary>Maps all of guest RAM and follows its changes.</summary>
    /// <exception cref="VmmException">The server refused a mapping or is gone; nothing stays registered.</exception>
    internal void Attach(VfioUserClient client, VfioUserFeatures features, GuestMemory memory)
    {
        _client = client;
        _features = features;
        _maxMapBytes = LargestMap(client.MaxDataBytes);
        _collected = [];
        // The listener gets one section at a time; they are collected, so that all their maps are sent together.
        _registration = memory.AddListener(this);
        List<VfioUserMapping> all = _collected;
        _collected = null;
        try
        {
            MapAll(all);
        }
        catch
        {
            Detach();
            throw;
        }
    }

    /// <summary>Stops following the RAM. The server keeps its mappings until the connection ends, which comes next.</summary>
    internal void Detach()
    {
        _client = null;
        _registration?.Dispose();
        _registration = null;
        lock (_dmaGate) _maps = [];
    }

    /// <inheritdoc cref="IVfioDeviceIo.SetBusMaster"/>
    internal void SetBusMaster(bool enabled) => _busMaster = enabled;

    /// <inheritdoc/>
    public void SectionAdded(GuestMemorySection section)
    {
        ArgumentNullException.ThrowIfNull(section);
        List<VfioUserMapping> pieces = VfioUserMapping.Split(section, _maxMapBytes, _client is { MaxFds: > 0 });
        if (_collected is not null) _collected.AddRange(pieces);
        else MapAll(pieces);
    }

    /// <inheritdoc/>
    public void SectionRemoved(GuestMemorySection section)
    {
        ArgumentNullException.ThrowIfNull(section);
        if (_collected is not null) return;
        VfioUserMapping[] gone = Array.FindAll(_maps, m => m.Section.Range == section.Range);
        foreach (VfioUserMapping one in gone)
        {
            if (_client is null) break;
            Errno errno = Unmap(_client, one);
            // A server that does not give up memory that is about to be freed must not go on.
            if (errno is not (Errno.None or Errno.ENOENT or Errno.ENODEV))
                _client.Fail(new VfioException($"vfio-user '{name}': the server does not give up {one.Range}: {Posix.Describe(errno)}", errno));
        }
        lock (_dmaGate) _maps = Array.FindAll(_maps, m => !gone.Contains(m));
    }

    /// <inheritdoc/>
    public Errno StartDirtyLog() => LogsByMessages ? Errno.None : DirtyPages(VfioUserDirtyPages.Start);

    /// <inheritdoc/>
    public Errno StopDirtyLog() => LogsByMessages ? Errno.None : DirtyPages(VfioUserDirtyPages.Stop);

    /// <inheritdoc/>
    public Errno GetDirtyBitmap(GuestRange range, Span<ulong> bitmap)
    {
        if (_client is null) return Errno.ENODEV;
        if ((ulong)bitmap.Length * 8 < VfioUserBitmap.BytesFor(range.LengthBytes, VfioUserLimits.PageBytes)) return Errno.EINVAL;
        foreach (VfioUserMapping map in _maps)
        {
            if (!map.IsWritableByFd || !map.Intersect(range, out GuestRange part)) continue;
            Errno errno = GetBitmap(_client, part, range, bitmap);
            if (errno != Errno.None) return errno;
        }
        return Errno.None;
    }

    /// <inheritdoc/>
    Errno IVfioUserDma.Read(ulong address, Span<byte> destination)
    {
        lock (_dmaGate)
        {
            Errno errno = Check(address, destination.Length, forWrite: false);
            while (errno == Errno.None && destination.Length > 0)
            {
                (RamBlock block, ulong offset, int n) = Locate(address, destination.Length);
                block.ReadOnlySlice(offset, n).CopyTo(destination);
                destination = destination[n..];
                address += (ulong)n;
            }
            return errno;
        }
    }

    /// <inheritdoc/>
    Errno IVfioUserDma.Write(ulong address, ReadOnlySpan<byte> source)
    {
        lock (_dmaGate)
        {
            Errno errno = Check(address, source.Length, forWrite: true);
            while (errno == Errno.None && source.Length > 0)
            {
                (RamBlock block, ulong offset, int n) = Locate(address, source.Length);
                source[..n].CopyTo(block.Slice(offset, n));
                block.MarkDirty(offset, (ulong)n);
                source = source[n..];
                address += (ulong)n;
            }
            return errno;
        }
    }

    /// <summary>Finds the longest contiguous piece from an address on; the range was checked.</summary>
    private (RamBlock Block, ulong Offset, int Length) Locate(ulong address, int length)
    {
        VfioUserMapping map = Find(address)!;
        return (map.Section.Block, map.BlockOffset(address), (int)Math.Min((ulong)length, map.Range.End - address));
    }

    /// <summary>Checks that all of a range is mapped, before the first byte moves.</summary>
    private Errno Check(ulong address, int length, bool forWrite)
    {
        if (!_busMaster || address > ulong.MaxValue - (ulong)length) return Errno.ENODEV;
        for (ulong at = address, end = address + (ulong)length; at < end;)
        {
            if (Find(at) is not { } map) return Errno.ENODEV;
            if (forWrite && map.Section.IsReadOnly) return Errno.EPERM;
            at = map.Range.End;
        }
        return Errno.None;
    }

    private VfioUserMapping? Find(ulong address)
    {
        foreach (VfioUserMapping map in _maps)
            if (map.Range.Contains(new GuestAddress(address))) return map;
        return null;
    }

    private void MapAll(List<VfioUserMapping> pieces)
    {
        if (_client is not { Fault: null } client) return; // A server that is gone needs no memory, and the VM runs on without it.
        if (_maps.Length + pieces.Count > client.Server.MaxDmaMaps)
            throw new VfioException($"vfio-user '{name}': {_maps.Length + pieces.Count} DMA maps are needed, the server takes {client.Server.MaxDmaMaps}", Errno.ENOSPC);
        VfioUserMapping[] before = _maps;
        // Set before the request is sent, because the server's first DMA may overtake its reply.
        lock (_dmaGate) _maps = [.. before.Concat(pieces).OrderBy(static m => m.Range.Start.Value)];
        var underway = new Queue<(VfioUserExchange Exchange, VfioUserMapping Map)>();
        var done = new List<VfioUserMapping>();
        VfioException? failure = null;
        foreach (VfioUserMapping piece in pieces)
        {
            if (underway.Count == PipelineDepth) Settle();
            if (failure is not null) break;
            VfioUserExchange x = client.Begin();
            piece.ToMessage().Write(x.Body(VfioUserDmaMap.Length));
            Errno errno = piece.Fd is { } fd ? x.Send(VfioUserCommand.DmaMap, fds: [fd]) : x.Send(VfioUserCommand.DmaMap);
            if (errno == Errno.None)
            {
                underway.Enqueue((x, piece));
                continue;
            }
            x.Dispose();
            failure = Refused(piece, errno);
        }
        while (underway.Count > 0) Settle();
        if (failure is null) return;
        foreach (VfioUserMapping one in done) Unmap(client, one);
        lock (_dmaGate) _maps = before;
        throw failure;

        void Settle()
        {
            (VfioUserExchange x, VfioUserMapping map) = underway.Dequeue();
            using (x)
            {
                Errno errno = x.Wait(client.TimeoutMs);
                if (errno == Errno.None) done.Add(map);
                else failure ??= Refused(map, errno);
            }
        }
    }

    private VfioException Refused(VfioUserMapping map, Errno errno) =>
        new($"vfio-user '{name}': the server refuses the DMA map of {map.Range} (block '{map.Section.Block.Name}'): {Posix.Describe(errno)}", errno, _client?.Fault);

    private static Errno Unmap(VfioUserClient client, VfioUserMapping map)
    {
        using VfioUserExchange x = client.Begin();
        new VfioUserDmaUnmap(VfioUserDmaUnmap.Length, 0, map.Range.Start.Value, map.Range.LengthBytes).Write(x.Body(VfioUserDmaUnmap.Length));
        return x.Run(VfioUserCommand.DmaUnmap);
    }

    private Errno DirtyPages(uint flags)
    {
        if (_client is null) return Errno.ENODEV;
        using VfioUserExchange x = _client.Begin();
        new VfioUserDirtyPages(VfioUserDirtyPages.Length, flags).Write(x.Body(VfioUserDirtyPages.Length));
        return x.Run(VfioUserCommand.DirtyPages);
    }

    private static Errno GetBitmap(VfioUserClient client, GuestRange part, GuestRange range, Span<ulong> bitmap)
    {
        const int head = VfioUserDirtyPages.Length + VfioUserDirtyRange.Length;
        const uint page = VfioUserLimits.PageBytes;
        if ((part.Start.Value | part.LengthBytes | range.Start.Value) % page != 0) return Errno.EINVAL;
        ulong bytes = VfioUserBitmap.BytesFor(part.LengthBytes, page);
        using VfioUserExchange x = client.Begin();
        Span<byte> body = x.Body(head);
        new VfioUserDirtyPages((uint)(head + bytes), VfioUserDirtyPages.Get).Write(body);
        new VfioUserDirtyRange(part.Start.Value, part.LengthBytes, new VfioUserBitmap(page, bytes)).Write(body[VfioUserDirtyPages.Length..]);
        Errno errno = x.Run(VfioUserCommand.DirtyPages, head + (int)bytes);
        if (errno != Errno.None) return errno;
        if (x.Reply.Length < head + (int)bytes) return Errno.EPROTO;
        VfioUserBitmap.OrInto(x.Reply[head..], part.LengthBytes / page, bitmap, (part.Start.Value - range.Start.Value) / page);
        return Errno.None;
    }

    /// <summary>
    /// A report covers one mapping and must fit into one reply (vfio-user C-6), so mappings are that long at most: a power of two, at least 2 MiB.
    /// </summary>
    private static ulong LargestMap(int maxDataBytes)
    {
        ulong bitmapBytes = (ulong)Math.Max(maxDataBytes - VfioUserFeature.Length - VfioUserLogReport.Length - VfioUserDirtyRange.Length, 64);
        ulong bytes = 2 << 20;
        while (VfioUserBitmap.BytesFor(bytes * 2, VfioUserLimits.PageBytes) <= bitmapBytes) bytes *= 2;
        return bytes;
    }
}
