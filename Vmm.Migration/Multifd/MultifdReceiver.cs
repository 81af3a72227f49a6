using System.Text;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Multifd;

/// <summary>
/// The destination's channels, one thread each (stream 4; QEMU: <c>multifd_recv_thread</c>). A thread that fails ends the whole load at once. A thread
/// stops at each SYNC until the main channel has come to the same point, so that no page overtakes an older copy of itself.
/// </summary>
internal sealed class MultifdReceiver : IDisposable
{
    /// <summary>Longest wait for a channel's SYNC or for the main channel's mark while nothing arrives.</summary>
    private static readonly TimeSpan s_syncTimeout = TimeSpan.FromSeconds(30);

    private readonly Link[] _links;
    private readonly Guid _uuid;
    private readonly FaultLatch _latch;
    private readonly CancellationTokenSource _cancel = new();
    private readonly IDisposable _shut;
    private readonly HashSet<byte> _ids = [];
    private readonly Lock _gate = new();
    private LoadStream? _stream;
    private ILoadPages? _pages;
    private int _rounds;
    private int _open;
    private volatile bool _done, _isWaiting;
    private bool _disposed;

    /// <summary>Makes a receiver whose threads do not run yet.</summary>
    /// <param name="channels">Connected channels; owned.</param>
    /// <param name="uuid">The VM's; the source must have the same.</param>
    /// <param name="latch">Takes the first failure.</param>
    internal MultifdReceiver(IReadOnlyList<IMigrationChannel> channels, Guid uuid, FaultLatch latch)
    {
        (_uuid, _latch) = (uuid, latch);
        _links = [.. channels.Select(static c => new Link(c))];
        _open = _links.Length;
        _shut = latch.OnSet(() =>
        {
            _cancel.Cancel();
            // A source that is told by its main channel closes these itself; Dispose waits for that.
            foreach (Link link in _links.Where(static l => l.Channel is not SocketChannel)) link.Channel.Shutdown(ChannelShutdown.Both);
        });
    }

    /// <summary>True while the load waits for what must come over these channels. Any thread.</summary>
    internal bool IsWaiting => _isWaiting;

    /// <summary>Starts the threads.</summary>
    /// <param name="stream">Its RAM and devices take what comes; set up already.</param>
    internal void Start(LoadStream stream)
    {
        (_stream, _pages) = (stream, stream.Pages);
        for (int i = 0; i < _links.Length; i++)
        {
            Link link = _links[i];
            link.Thread = WorkerThread.Run($"mig/dst/recv_{i}", () => Receive(link));
        }
    }

    /// <summary>Called at the main channel's mark: waits until all channels have come to their SYNC, then lets them go on.</summary>
    internal void WaitSync()
    {
        _rounds++;
        _isWaiting = true;
        try
        {
            foreach (Link link in _links)
            {
                WaitReached(link);
                if (Volatile.Read(ref link.Syncs) < _rounds) throw new ChannelException($"{link.Channel.Name}: a channel of multifd ended before its sync {_rounds}", Errno.ECONNRESET);
            }
        }
        catch (OperationCanceledException)
        {
            _latch.ThrowIfSet();
            throw;
        }
        finally
        {
            _isWaiting = false;
        }
        foreach (Link link in _links) link.Go.Release();
    }

    private void WaitReached(Link link)
    {
        for (long packets = -1; !link.Reached.Wait(s_syncTimeout, _cancel.Token);)
        {
            long now = Interlocked.Read(ref link.Arrived);
            if (now == packets) throw new ChannelException($"{link.Channel.Name}: nothing came on a channel of multifd for {s_syncTimeout.TotalSeconds:0} s before its sync {_rounds}", Errno.ETIMEDOUT);
            packets = now;
        }
    }

    /// <summary>
    /// Checks before the confirmation that every channel stands at the SYNC of the main channel's last mark with nothing behind it, and that all packets
    /// came. The source numbers packets over all its channels, so a channel that is not read here leaves a gap.
    /// </summary>
    /// <param name="endsAtSync">
    /// True when the last packet must be a SYNC. False for sources that sync after each section: 7.2 can set the SYNC flag on a packet of pages and then send
    /// an empty packet.
    /// </param>
    /// <exception cref="IncompatibleStateException">Something is missing or left over.</exception>
    internal void ThrowIfIncomplete(bool endsAtSync)
    {
        long packets = 0, next = 0;
        foreach (Link link in _links)
        {
            int syncs = Volatile.Read(ref link.Syncs);
            if (syncs != _rounds) throw Incomplete(link, $"{_rounds} SYNCs as in the main channel", $"{syncs}");
            if (link.HasUnsynced || (endsAtSync && link.Channel is SocketChannel socket && socket.HasUnread())) throw Incomplete(link, "nothing after its last SYNC", "more");
            packets += Interlocked.Read(ref link.Packets);
            next = Math.Max(next, Interlocked.Read(ref link.NextNumber));
        }
        if (packets == next || !endsAtSync) return;
        throw new IncompatibleStateException($"the source sent {next} packets over multifd, {packets} of them over the {_links.Length} channels that are expected here: it opened more")
        {
            Section = "multifd", Expected = $"{next}", Found = $"{packets}", Hint = $"set parameter multifd-channels to {_links.Length} on the source",
        };
    }

    private static IncompatibleStateException Incomplete(Link link, string expected, string found) =>
        new($"{link.Channel.Name}: a channel of multifd has not ended with the main channel: expected {expected}, found {found}") { Section = "multifd", Expected = expected, Found = found };

    /// <summary>Waits until devices have loaded the buffers that came for them. BQL: not held.</summary>
    internal void WaitDevices()
    {
        foreach (ILoadStateBuffer buffers in _stream!.AllBuffers())
        {
            try
            {
                buffers.WaitLoaded(_cancel.Token);
            }
            catch (OperationCanceledException)
            {
                _latch.ThrowIfSet();
                throw;
            }
        }
    }

    /// <summary>After a failed load: reads every channel to its end (<see cref="ChannelDiscard"/>), also those that had no thread yet. Does not wait.</summary>
    internal void Discard()
    {
        for (int i = 0; i < _links.Length; i++)
        {
            Link link = _links[i];
            link.Thread ??= WorkerThread.Run($"mig/dst/recv_{i}", () => ChannelDiscard.ReadToEnd(link.Channel));
        }
    }

    /// <summary>
    /// Ends threads and channels, whether the load succeeded or not. After a failure the threads read on until the source has closed the channels, for at most
    /// <see cref="ChannelDiscard.Limit"/>.
    /// </summary>
    public void Dispose()
    {
        if (_disposed) return;
        _disposed = true;
        if (_latch.IsSet)
        {
            Discard();
            Task.WaitAll([.. _links.Select(static l => l.Thread!)], ChannelDiscard.Limit);
        }
        _done = true;
        _cancel.Cancel();
        foreach (Link link in _links) link.Channel.Shutdown(ChannelShutdown.Both);
        Task.WaitAll([.. _links.Select(static l => l.Thread ?? Task.CompletedTask)]);
        _shut.Dispose();
        foreach (Link link in _links) link.Channel.Dispose();
        _cancel.Dispose();
    }

    private void Receive(Link link)
    {
        try
        {
            var f = new QemuFileReader(link.Channel) { Section = "multifd" };
            ReadPreamble(f);
            // A source that has sent everything closes its channels.
            while (f.Peek(1).Length > 0)
            {
                _latch.ThrowIfSet();
                ReadPacket(f, link);
                Interlocked.Increment(ref link.Arrived);
            }
            if (Interlocked.Decrement(ref _open) == 0) EndBuffers();
        }
#pragma warning disable CA1031 // The latch keeps it as the load's reason, unless the load is over.
        catch (Exception e)
#pragma warning restore CA1031
        {
            if (!_done) _latch.Set(e);
        }
        finally
        {
            link.Reached.Release();
        }
        if (_latch.IsSet) ChannelDiscard.ReadToEnd(link.Channel);
    }

    private void EndBuffers()
    {
        foreach (ILoadStateBuffer buffers in _stream!.AllBuffers()) buffers.NoMoreBuffers();
    }

    private void ReadPreamble(QemuFileReader f)
    {
        ReadMagic(f);
        Span<byte> rest = stackalloc byte[MultifdPacket.PreambleBytes - 8];
        f.Read(rest);
        var uuid = new Guid(rest[..16], bigEndian: true);
        if (uuid != _uuid)
            throw new IncompatibleStateException($"UUID of a multifd channel differs: {_uuid} here, {uuid} in the stream") { Section = f.Section, Expected = _uuid.ToString(), Found = uuid.ToString() };
        byte id = rest[MultifdPacket.PreambleIdOffset - 8];
        if (id >= _links.Length)
        {
            IncompatibleStateException refusal = ChannelCount.Refusal(id + 1, _links.Length);
            throw new IncompatibleStateException($"{refusal.Message} (id of a multifd channel: {id})") { Section = f.Section, Expected = refusal.Expected, Found = refusal.Found, Hint = refusal.Hint };
        }
        lock (_gate)
            if (!_ids.Add(id)) throw f.Bad("id of a multifd channel", $"0 to {_links.Length - 1}, each once", id.ToString());
    }

    private static void ReadMagic(QemuFileReader f)
    {
        uint magic = f.ReadUInt32(), version = f.ReadUInt32();
        if (magic != MultifdPacket.Magic) throw f.Bad("magic of a multifd packet", $"0x{MultifdPacket.Magic:x8}", $"0x{magic:x8}");
        if (version != MultifdPacket.Version) throw f.Bad("version of a multifd packet", MultifdPacket.Version.ToString(), version.ToString());
    }

    private void ReadPacket(QemuFileReader f, Link link)
    {
        ReadMagic(f);
        var flags = (MultifdFlags)f.ReadUInt32();
        if ((flags & ~(MultifdFlags.Sync | MultifdFlags.DeviceState)) != 0)
            throw f.Bad("flags of a multifd packet", "SYNC or DEVICE_STATE; no compression", $"0x{(uint)flags:x}");
        if ((flags & MultifdFlags.DeviceState) != 0) ReadState(f, flags);
        else ReadPages(f, link);
        if ((flags & MultifdFlags.Sync) == 0) return;
        link.HasUnsynced = false;
        int sync = Interlocked.Increment(ref link.Syncs);
        link.Reached.Release();
        if (!link.Go.Wait(s_syncTimeout, _cancel.Token))
            throw new ChannelException($"{link.Channel.Name}: the main channel's mark for sync {sync} of a multifd channel did not come within {s_syncTimeout.TotalSeconds:0} s", Errno.ETIMEDOUT);
    }

    private void ReadPages(QemuFileReader f, Link link)
    {
        uint allocated = f.ReadUInt32(), normal = f.ReadUInt32();
        f.Skip(4); // next_packet_size, in which 7.2 leaves an old value
        long number = (long)(f.ReadUInt64() & long.MaxValue);
        Interlocked.Increment(ref link.Packets);
        Interlocked.Exchange(ref link.NextNumber, Math.Max(link.NextNumber, number == long.MaxValue ? number : number + 1));
        uint zero = f.ReadUInt32();
        f.Skip(28);
        Span<byte> name = stackalloc byte[MultifdPacket.NameBytes];
        f.Read(name);
        Span<ulong> offsets = stackalloc ulong[MultifdPacket.PagesAllocated];
        for (int i = 0; i < offsets.Length; i++) offsets[i] = f.ReadUInt64();
        if (allocated > MultifdPacket.PagesAllocated || normal > MultifdPacket.PagesAllocated || zero > MultifdPacket.PagesAllocated - normal)
            throw f.Bad("pages of a multifd packet", $"at most {MultifdPacket.PagesAllocated}", $"{normal} and {zero} of {allocated}");
        if (normal + zero == 0) return;
        link.HasUnsynced = true;
        ILoadPages pages = _pages ?? throw new IncompatibleStateException("pages came over multifd, and nothing here takes them") { Section = f.Section };
        RamBlock block = pages.FindBlock(Text(name)) ?? throw f.Bad("RAM block", "one that is here", $"'{Text(name)}'");
        for (int i = 0; i < (int)(normal + zero); i++)
            if (offsets[i] % RamBlock.PageSize != 0 || offsets[i] >= block.SizeBytes) throw f.Bad($"page offset in RAM block '{block.Name}'", $"a page below 0x{block.SizeBytes:x}", $"0x{offsets[i]:x}");
        for (int i = 0; i < (int)normal;)
        {
            int n = 1;
            while (i + n < (int)normal && offsets[i + n] == offsets[i] + ((ulong)n * RamBlock.PageSize)) n++;
            f.ReadGuest(block, offsets[i], n * RamBlock.PageSize);
            pages.NoteLoaded(block, offsets[i], n);
            i += n;
        }
        for (int i = (int)normal; i < (int)(normal + zero); i++) pages.LoadZeroPage(block, offsets[i]);
    }

    private void ReadState(QemuFileReader f, MultifdFlags flags)
    {
        Span<byte> name = stackalloc byte[MultifdPacket.NameBytes];
        f.Read(name);
        int instance = (int)f.ReadUInt32();
        uint length = f.ReadUInt32();
        if ((flags & MultifdFlags.Sync) != 0 || name.IndexOf((byte)0) < 0) throw f.Bad("packet of device state", "a name that ends, and no SYNC", $"flags 0x{(uint)flags:x}");
        if (length == 0) throw f.Bad("length of device state", "at least 1", "0");
        if (length > WireLimits.MultifdStateBytes) throw new StreamLimitException($"{length} bytes of device state in one packet are over {WireLimits.MultifdStateBytes} (WireLimits.MultifdStateBytes)");
        string idStr = Text(name);
        if (_stream!.FindBuffers(idStr, instance) is not { } buffers)
            throw new IncompatibleStateException($"device state came over multifd for '{idStr}' instance {instance}, which does not take it here") { Section = f.Section, Found = idStr };
        StateBuffer state = StateBuffer.Rent((int)length);
        try
        {
            f.Read(state.Span);
        }
        catch
        {
            state.Dispose();
            throw;
        }
        buffers.LoadStateBuffer(state);
    }

    private static string Text(ReadOnlySpan<byte> name) => Encoding.ASCII.GetString(name[..(name.IndexOf((byte)0) is var end and >= 0 ? end : name.Length - 1)]);

    private sealed class Link(IMigrationChannel channel)
    {
        internal int Syncs;

        /// <summary>Packets of pages and SYNCs, which have numbers; those of device state have none.</summary>
        internal long Packets;

        /// <summary>Packets of every kind that were taken: while this grows, the channel moves on.</summary>
        internal long Arrived;

        /// <summary>One more than the highest number.</summary>
        internal long NextNumber;

        /// <summary>True while pages have come after the last SYNC, or are coming.</summary>
        internal volatile bool HasUnsynced;

        internal IMigrationChannel Channel { get; } = channel;

        /// <summary>Released at each SYNC, and at the channel's end.</summary>
        internal SemaphoreSlim Reached { get; } = new(0);

        internal SemaphoreSlim Go { get; } = new(0);

        internal Task? Thread { get; set; }
    }
}
