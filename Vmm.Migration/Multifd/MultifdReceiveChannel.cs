using System.Text;
using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Multifd;

/// <summary>
/// One channel of the destination (QEMU: <c>multifd_recv_thread</c>). Pages go from the socket straight into guest memory. One thread reads; the counters may
/// be read by any.
/// </summary>
internal sealed class MultifdReceiveChannel : IDisposable
{
    private readonly MultifdSettings _settings;
    private readonly QemuFileReader _f;
    private readonly GatherList _list = new(64);
    private readonly ulong[] _offsets = new ulong[MultifdPacket.PagesAllocated];
    private readonly PageDecompressor? _decompressor;
    private readonly byte[] _payload;
    private readonly byte[] _name = new byte[MultifdPacket.NameBytes], _lastName = new byte[MultifdPacket.NameBytes];
    private ILoadBlock? _block;

    /// <param name="channel">Connected; owned.</param>
    /// <param name="settings">The attempt's.</param>
    internal MultifdReceiveChannel(IMigrationChannel channel, MultifdSettings settings)
    {
        (Channel, _settings) = (channel, settings);
        // No further ahead than one header, so that the pages behind it do not pass the buffer.
        _f = new QemuFileReader(channel) { Section = "multifd", ReadAheadBytes = MultifdPacket.HeaderBytes };
        _decompressor = PageDecompressor.Of(settings);
        _payload = _decompressor is null ? [] : GC.AllocateUninitializedArray<byte>(WireLimits.MultifdCompressedBytes, pinned: true);
    }

    internal IMigrationChannel Channel { get; }

    /// <summary>True when device state may come, too.</summary>
    internal bool CarriesState => _settings.CarriesState;

    /// <summary>The thread that reads; null before it starts.</summary>
    internal Task? Thread { get; set; }

    /// <summary>What has come so far.</summary>
    internal ReceivedPackets Packets { get; } = new();

    /// <summary>While this grows, the channel moves on.</summary>
    internal long Received => Channel is SocketChannel socket ? socket.ReceivedBytes : Interlocked.Read(ref Packets.Arrived);

    /// <summary>One more than the highest number.</summary>
    internal long NextNumber;

    /// <summary>Released at each SYNC, and at the channel's end.</summary>
    internal SemaphoreSlim Reached { get; } = new(0);

    /// <summary>Released when the main channel has come to the same SYNC.</summary>
    internal SemaphoreSlim Go { get; } = new(0);

    /// <summary>True when another packet has begun; false at the end of the channel.</summary>
    internal bool HasMore => _f.Peek(1).Length > 0;

    /// <summary>Reads the first bytes.</summary>
    /// <param name="uuid">The VM's.</param>
    /// <param name="channels">How many channels there are.</param>
    /// <returns>The channel's id, below <paramref name="channels"/>.</returns>
    internal byte ReadPreamble(Guid uuid, int channels)
    {
        ReadMagic();
        Span<byte> rest = stackalloc byte[MultifdPacket.PreambleBytes - 8];
        _f.Read(rest);
        var found = new Guid(rest[..16], bigEndian: true);
        if (found != uuid)
            throw new IncompatibleStateException($"UUID of a multifd channel differs: {uuid} here, {found} in the stream") { Section = _f.Section, Expected = uuid.ToString(), Found = found.ToString() };
        byte id = rest[MultifdPacket.PreambleIdOffset - 8];
        if (id < channels) return id;
        IncompatibleStateException refusal = ChannelCount.Refusal(id + 1, channels);
        throw new IncompatibleStateException($"{refusal.Message} (id of a multifd channel: {id})") { Section = _f.Section, Expected = refusal.Expected, Found = refusal.Found, Hint = refusal.Hint };
    }

    /// <summary>The error for an id that another channel has already.</summary>
    internal Exception SameId(byte id, int channels) => _f.Bad("id of a multifd channel", $"0 to {channels - 1}, each once", id.ToString());

    /// <summary>Reads one packet.</summary>
    /// <returns>True when it was, or had with it, a SYNC.</returns>
    internal bool ReadPacket(LoadStream stream, ILoadPages? pages)
    {
        ReadMagic();
        var flags = (MultifdFlags)_f.ReadUInt32();
        if ((flags & ~(MultifdFlags.Sync | MultifdFlags.DeviceState | MultifdFlags.MethodMask)) != 0)
            throw _f.Bad("flags of a multifd packet", "SYNC, DEVICE_STATE or a compression", $"0x{(uint)flags:x}");
        if ((flags & MultifdFlags.DeviceState) != 0) ReadState(stream, flags);
        else ReadPages(pages, flags & MultifdFlags.MethodMask);
        return (flags & MultifdFlags.Sync) != 0;
    }

    public void Dispose()
    {
        Channel.Dispose();
        _list.Dispose();
        _decompressor?.Dispose();
    }

    private void ReadMagic()
    {
        uint magic = _f.ReadUInt32(), version = _f.ReadUInt32();
        if (magic != MultifdPacket.Magic) throw _f.Bad("magic of a multifd packet", $"0x{MultifdPacket.Magic:x8}", $"0x{magic:x8}");
        if (version != MultifdPacket.Version) throw _f.Bad("version of a multifd packet", MultifdPacket.Version.ToString(), version.ToString());
    }

    private void ReadPages(ILoadPages? pages, MultifdFlags method)
    {
        uint allocated = _f.ReadUInt32(), normal = _f.ReadUInt32(), payloadBytes = _f.ReadUInt32();
        long number = (long)(_f.ReadUInt64() & long.MaxValue);
        Interlocked.Increment(ref Packets.Numbered);
        Interlocked.Exchange(ref Packets.NextNumber, Math.Max(Packets.NextNumber, number == long.MaxValue ? number : number + 1));
        uint zero = _f.ReadUInt32();
        _f.Skip(28);
        _f.Read(_name);
        for (int i = 0; i < _offsets.Length; i++) _offsets[i] = _f.ReadUInt64();
        if (allocated > MultifdPacket.PagesAllocated || normal > MultifdPacket.PagesAllocated || zero > MultifdPacket.PagesAllocated - normal)
            throw _f.Bad("pages of a multifd packet", $"at most {MultifdPacket.PagesAllocated}", $"{normal} and {zero} of {allocated}");
        if (normal + zero == 0) return;
        Packets.HasUnsynced = true;
        if (normal > 0 && method != _settings.Method) throw OtherMethod(method);
        ILoadBlock load = FindBlock(pages ?? throw new IncompatibleStateException("pages came over multifd, and nothing here takes them") { Section = _f.Section });
        RamBlock block = load.Block;
        foreach (ulong offset in _offsets.AsSpan(0, (int)(normal + zero)))
            if (offset % RamBlock.PageSize != 0 || offset >= block.SizeBytes) throw _f.Bad($"page offset in RAM block '{block.Name}'", $"a page below 0x{block.SizeBytes:x}", $"0x{offset:x}");
        if (normal > 0) ReadContent(load, _offsets.AsSpan(0, (int)normal), payloadBytes);
        foreach (ulong offset in _offsets.AsSpan((int)normal, (int)zero)) load.LoadZeroPage(offset);
    }

    private ILoadBlock FindBlock(ILoadPages pages)
    {
        if (_block is { } same && _name.AsSpan().SequenceEqual(_lastName)) return same;
        _block = pages.FindBlock(Text(_name)) ?? throw _f.Bad("RAM block", "one that is here", $"'{Text(_name)}'");
        _name.CopyTo(_lastName, 0);
        return _block;
    }

    /// <summary>Reads the pages' content. Without compression the header's length says nothing (stream 4.2).</summary>
    private void ReadContent(ILoadBlock load, ReadOnlySpan<ulong> offsets, uint payloadBytes)
    {
        if (_decompressor is { } decompressor) BeginPayload(decompressor, payloadBytes);
        Span<(ulong Offset, int Pages)> runs = stackalloc (ulong, int)[MultifdPacket.PagesAllocated];
        int count = Runs(offsets, runs);
        foreach ((ulong offset, int pages) in runs[..count])
        {
            if (_decompressor is null) load.Block.AppendToFill(_list, offset, pages * RamBlock.PageSize);
            else if (!_decompressor.TryRead(load.Block.Slice(offset, pages * RamBlock.PageSize)))
                throw _f.Bad("compressed pages of a multifd packet", $"{offsets.Length} pages", $"{payloadBytes} bytes that hold fewer");
        }
        if (_decompressor is null) ReadInto();
        else if (_decompressor.End() is > 0 and int left) throw _f.Bad("compressed pages of a multifd packet", $"{offsets.Length} pages", $"{left} bytes more");
        foreach ((ulong offset, int pages) in runs[..count]) load.NoteLoaded(offset, pages);
    }

    private void ReadInto()
    {
        try
        {
            _f.ReadScatter(_list);
        }
        finally
        {
            _list.Clear();
        }
    }

    private void BeginPayload(PageDecompressor decompressor, uint bytes)
    {
        if (bytes == 0) throw _f.Bad("length of compressed pages", "at least 1", "0");
        if (bytes > WireLimits.MultifdCompressedBytes) throw _f.Over($"{bytes} bytes of compressed pages in one packet", WireLimits.MultifdCompressedBytes, nameof(WireLimits.MultifdCompressedBytes));
        _f.Read(_payload.AsSpan(0, (int)bytes));
        decompressor.Begin(_payload, (int)bytes);
    }

    private static int Runs(ReadOnlySpan<ulong> offsets, Span<(ulong Offset, int Pages)> runs)
    {
        int count = 0;
        for (int i = 0; i < offsets.Length;)
        {
            int n = 1;
            while (i + n < offsets.Length && offsets[i + n] == offsets[i] + ((ulong)n * RamBlock.PageSize)) n++;
            runs[count++] = (offsets[i], n);
            i += n;
        }
        return count;
    }

    private IncompatibleStateException OtherMethod(MultifdFlags method)
    {
        string found = Name(method), expected = Name(_settings.Method);
        return new IncompatibleStateException($"the source compresses pages by '{found}', this side expects '{expected}'")
        {
            Section = _f.Section, Offset = _f.Position, Expected = expected, Found = found, Hint = $"set parameter multifd-compression to {expected} on the source",
        };
    }

    private static string Name(MultifdFlags method) => method switch
    {
        MultifdFlags.None => "none",
        MultifdFlags.Zlib => "zlib",
        MultifdFlags.Zstd => "zstd",
        _ => $"0x{(uint)method:x}",
    };

    private void ReadState(LoadStream stream, MultifdFlags flags)
    {
        _f.Read(_name);
        int instance = (int)_f.ReadUInt32();
        uint length = _f.ReadUInt32();
        if (!_settings.CarriesState) throw _f.Bad("flags of a multifd packet", "no device state with compressed pages", $"0x{(uint)flags:x}");
        if (flags != MultifdFlags.DeviceState || _name.AsSpan().IndexOf((byte)0) < 0) throw _f.Bad("packet of device state", "a name that ends, and no SYNC", $"flags 0x{(uint)flags:x}");
        if (length == 0) throw _f.Bad("length of device state", "at least 1", "0");
        if (length > WireLimits.MultifdStateBytes) throw new StreamLimitException($"{length} bytes of device state in one packet are over {WireLimits.MultifdStateBytes} (WireLimits.MultifdStateBytes)");
        string idStr = Text(_name);
        if (stream.FindBuffers(idStr, instance) is not { } buffers)
            throw new IncompatibleStateException($"device state came over multifd for '{idStr}' instance {instance}, which does not take it here") { Section = _f.Section, Found = idStr };
        StateBuffer state = StateBuffer.Rent((int)length);
        try
        {
            _f.Read(state.Span);
        }
        catch
        {
            state.Dispose();
            throw;
        }
        buffers.LoadStateBuffer(state);
    }

    private static string Text(ReadOnlySpan<byte> name) => Encoding.ASCII.GetString(name[..(name.IndexOf((byte)0) is var end and >= 0 ? end : name.Length - 1)]);
}

/// <summary>What has come over one channel. Its thread writes, any thread reads.</summary>
internal sealed class ReceivedPackets
{
    /// <summary>SYNCs.</summary>
    internal int Syncs;

    /// <summary>Packets of pages and SYNCs, which have numbers; those of device state have none.</summary>
    internal long Numbered;

    /// <summary>Packets of every kind.</summary>
    internal long Arrived;

    /// <summary>One more than the highest number.</summary>
    internal long NextNumber;

    /// <summary>True while pages have come after the last SYNC, or are coming.</summary>
    internal volatile bool HasUnsynced;
}
