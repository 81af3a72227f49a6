using Vmm.Core.Errors;

namespace Vmm.Core.Memory;

/// <summary>
/// All RAM of one VM: named blocks and their places in the guest-physical address space. Blocks are added before the VM first runs and live as long
/// as this object, unless removed. Reads and writes check bounds; they are thread-safe. Adding and removing need the BQL once the VM has devices (QEMU:
/// <c>ram_list</c> and the system address space).
/// </summary>
public sealed class GuestMemory : IDisposable
{
    /// <summary>First and end address of the range for devices on a PC.</summary>
    internal const ulong DevicesAddress = 3UL << 30, AfterDevices = 4UL << 30;

    private readonly List<RamBlock> _blocks = [];
    private readonly List<IDirtyLogSource> _sources = [];
    private readonly List<IGuestMemoryListener> _listeners = [];
    private readonly Lock _gate = new();
    private uint _granularityBytes;
    private int _logUsers;

    /// <summary>Blocks in the order of their addition.</summary>
    public IReadOnlyList<RamBlock> Blocks => _blocks;

    /// <summary>Sum of all block sizes.</summary>
    public ulong TotalBytes => _blocks.Aggregate(0UL, static (sum, b) => sum + b.SizeBytes);

    /// <summary>True while write logging runs.</summary>
    public bool IsDirtyLogging => _logUsers > 0;

    /// <summary>Adds a block at the next free 2 MiB boundary of the guest-physical space.</summary>
    /// <param name="options">Name, size and backing of the block.</param>
    /// <param name="aroundDevices">True to leave the last GiB below 4 GiB to devices, as on every PC.</param>
    /// <returns>The block; this object owns it.</returns>
    /// <exception cref="ConfigurationException">An option is bad, or the name is in use.</exception>
    /// <exception cref="ChannelException">The kernel could not provide the memory.</exception>
    public RamBlock AddBlock(RamBlockOptions options, bool aroundDevices = false)
    {
        ArgumentNullException.ThrowIfNull(options);
        return AddBlock(options, NextAddress(_blocks.Count == 0 ? 0 : _blocks.Max(static b => b.Range.End), options.SizeBytes, aroundDevices));
    }

    /// <summary>Returns the address at which <see cref="AddBlock(RamBlockOptions, bool)"/> puts a block.</summary>
    /// <param name="end">End of the previous blocks; 0 for the first block, which is always at address 0.</param>
    /// <param name="sizeBytes">Size of the block.</param>
    /// <param name="aroundDevices">True to leave the last GiB below 4 GiB to devices.</param>
    public static GuestAddress NextAddress(ulong end, ulong sizeBytes, bool aroundDevices)
    {
        const ulong alignment = 2 << 20;
        ulong next = (end + alignment - 1) & ~(alignment - 1);
        return new GuestAddress(aroundDevices && end != 0 && next < AfterDevices && (next >= DevicesAddress || sizeBytes > DevicesAddress - next) ? AfterDevices : next);
    }

    /// <summary>Adds a block at a given address.</summary>
    /// <param name="options">Name, size and backing of the block.</param>
    /// <param name="address">Page-aligned guest-physical address.</param>
    /// <returns>The block; this object owns it.</returns>
    /// <exception cref="ConfigurationException">An option is bad, the name is in use, or the block overlaps another one.</exception>
    /// <exception cref="ChannelException">The kernel could not provide the memory.</exception>
    public RamBlock AddBlock(RamBlockOptions options, GuestAddress address)
    {
        ArgumentNullException.ThrowIfNull(options);
        if (FindBlock(options.Name) is not null) throw new ConfigurationException($"RAM block '{options.Name}' exists already");
        if (address.Value % RamBlock.PageSize != 0) throw new ConfigurationException($"RAM block '{options.Name}': address {address} is not page aligned");
        if (options.SizeBytes > ulong.MaxValue - address.Value) throw new ConfigurationException($"RAM block '{options.Name}' does not fit at {address}");
        RamBlock? other = _blocks.Find(b => address.Value < b.Range.End && b.Address.Value < address.Value + options.SizeBytes);
        if (other is not null) throw new ConfigurationException($"RAM block '{options.Name}' at {address} overlaps block '{other.Name}' at {other.Range}");
        var block = new RamBlock(options, address);
        int told = 0;
        try
        {
            for (; told < _listeners.Count; told++) _listeners[told].SectionAdded(Section(block));
        }
        catch
        {
            while (--told >= 0) _listeners[told].SectionRemoved(Section(block));
            block.Dispose();
            throw;
        }
        _blocks.Add(block);
        return block;
    }

    /// <summary>Removes a block from the address space and frees it. No write log and no migration may run. BQL: held.</summary>
    /// <exception cref="InvalidOperationException">A write log runs.</exception>
    /// <exception cref="ArgumentException">The block does not belong to this memory.</exception>
    public void RemoveBlock(RamBlock block)
    {
        ArgumentNullException.ThrowIfNull(block);
        if (IsDirtyLogging) throw new InvalidOperationException($"RAM block '{block.Name}' cannot be removed while writes are logged");
        if (!_blocks.Contains(block)) throw new ArgumentException($"RAM block '{block.Name}' does not belong to this memory", nameof(block));
        for (int i = _listeners.Count - 1; i >= 0; i--) _listeners[i].SectionRemoved(Section(block));
        _blocks.Remove(block);
        block.Dispose();
    }

    /// <summary>Adds a listener and tells it about all present RAM. BQL: held.</summary>
    /// <returns>Dispose, with the BQL held, to remove the listener; it hears first that all RAM goes.</returns>
    /// <exception cref="VmmException">The listener refused a block; it is not added.</exception>
    public IDisposable AddListener(IGuestMemoryListener listener)
    {
        ArgumentNullException.ThrowIfNull(listener);
        int told = 0;
        try
        {
            for (; told < _blocks.Count; told++) listener.SectionAdded(Section(_blocks[told]));
        }
        catch
        {
            while (--told >= 0) listener.SectionRemoved(Section(_blocks[told]));
            throw;
        }
        _listeners.Add(listener);
        return new Registration(() =>
        {
            if (!_listeners.Remove(listener)) return;
            for (int i = _blocks.Count - 1; i >= 0; i--) listener.SectionRemoved(Section(_blocks[i]));
        });
    }

    /// <summary>Finds a block by name.</summary>
    /// <returns>The block or null.</returns>
    public RamBlock? FindBlock(string name) => _blocks.Find(b => b.Name == name);

    /// <summary>Finds the block that holds an address.</summary>
    /// <returns>The block or null.</returns>
    public RamBlock? FindBlock(GuestAddress address)
    {
        foreach (RamBlock block in _blocks)
            if (block.Range.Contains(address)) return block;
        return null;
    }

    /// <summary>Reads guest memory.</summary>
    /// <param name="address">Guest-physical address of the first byte.</param>
    /// <param name="destination">Filled completely.</param>
    /// <exception cref="ArgumentOutOfRangeException">Part of the range is not RAM.</exception>
    public void Read(GuestAddress address, Span<byte> destination)
    {
        while (destination.Length > 0)
        {
            (RamBlock block, ulong offset, int n) = Locate(address, destination.Length);
            block.ReadOnlySlice(offset, n).CopyTo(destination);
            destination = destination[n..];
            address += (ulong)n;
        }
    }

    /// <summary>Writes guest memory and marks it dirty.</summary>
    /// <exception cref="ArgumentOutOfRangeException">Part of the range is not RAM; the bytes before that part were written.</exception>
    public void Write(GuestAddress address, ReadOnlySpan<byte> source)
    {
        while (source.Length > 0)
        {
            (RamBlock block, ulong offset, int n) = Locate(address, source.Length);
            source[..n].CopyTo(block.Slice(offset, n));
            block.MarkDirty(offset, (ulong)n);
            source = source[n..];
            address += (ulong)n;
        }
    }

    /// <summary>Adds a source of dirty marks; starts it at once if logging runs. BQL: held.</summary>
    /// <returns>Dispose, with the BQL held, to remove it.</returns>
    /// <exception cref="VmmException">Logging runs and the source cannot start; it is not added.</exception>
    public IDisposable AddDirtyLogSource(IDirtyLogSource source)
    {
        ArgumentNullException.ThrowIfNull(source);
        lock (_gate)
        {
            if (_logUsers > 0) _granularityBytes = Math.Max(_granularityBytes, source.Start(Ranges(), RamBlock.PageSize));
            _sources.Add(source);
        }
        return new Registration(() =>
        {
            lock (_gate)
            {
                if (_sources.Remove(source) && _logUsers > 0) source.Stop();
            }
        });
    }

    /// <summary>Starts write logging, or adds a user if it runs already. BQL: held.</summary>
    /// <returns>The coarsest granularity of all sources, bytes.</returns>
    /// <exception cref="VmmException">A source could not start; all others are stopped again.</exception>
    public uint StartDirtyLog()
    {
        lock (_gate)
        {
            if (_logUsers > 0) { _logUsers++; return _granularityBytes; }
            _granularityBytes = RamBlock.PageSize;
            foreach (RamBlock block in _blocks) block.SetLog(new DirtyBitmap(block.PageCount));
            int started = 0;
            try
            {
                for (; started < _sources.Count; started++)
                    _granularityBytes = Math.Max(_granularityBytes, _sources[started].Start(Ranges(), RamBlock.PageSize));
            }
            catch
            {
                for (int i = started; i >= 0; i--) _sources[i].Stop();
                foreach (RamBlock block in _blocks) block.SetLog(null);
                throw;
            }
            _logUsers = 1;
            return _granularityBytes;
        }
    }

    /// <summary>Moves the marks of one block from all sources into a bitmap. BQL: held.</summary>
    /// <param name="block">Must belong to this memory.</param>
    /// <param name="into">One bit for each page of the block.</param>
    /// <exception cref="VmmException">A source failed; marks may be lost.</exception>
    public void HarvestDirtyLog(RamBlock block, DirtyBitmap into)
    {
        ArgumentNullException.ThrowIfNull(block);
        lock (_gate)
        {
            block.HarvestLog(into);
            foreach (IDirtyLogSource source in _sources) source.Harvest(block.Range, into);
        }
    }

    /// <summary>Removes a user of write logging, which stops with its last user. BQL: held.</summary>
    public void StopDirtyLog()
    {
        lock (_gate)
        {
            if (_logUsers == 0 || --_logUsers > 0) return;
            foreach (IDirtyLogSource source in _sources) source.Stop();
            foreach (RamBlock block in _blocks) block.SetLog(null);
        }
    }

    /// <summary>Unmaps all blocks. Afterwards nothing may use the memory.</summary>
    public void Dispose()
    {
        foreach (RamBlock block in _blocks) block.Dispose();
        _blocks.Clear();
    }

    private static GuestMemorySection Section(RamBlock block) => new(block.Range, block, 0);

    private List<GuestRange> Ranges() => _blocks.ConvertAll(static b => b.Range);

    private (RamBlock Block, ulong Offset, int Length) Locate(GuestAddress address, int length)
    {
        RamBlock block = FindBlock(address) ?? throw new ArgumentOutOfRangeException(nameof(address), $"guest address {address} is not RAM");
        ulong offset = address.Value - block.Address.Value;
        return (block, offset, (int)Math.Min((ulong)length, block.SizeBytes - offset));
    }
}
