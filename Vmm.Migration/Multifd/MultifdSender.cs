using System.Collections.Concurrent;
using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;

namespace Vmm.Migration.Multifd;

/// <summary>
/// The source's channels, one thread each (stream 4; QEMU: <c>multifd_send_thread</c>): they carry pages of RAM, SYNCs and buffers of device state. Pages and
/// SYNCs come from one thread, buffers of devices from any. Memory is bounded: at most two packets wait for a channel.
/// </summary>
internal sealed class MultifdSender : IDataChannels, IDisposable
{
    private const int WaitingPackets = 2;

    private readonly Link[] _links;
    private readonly FaultLatch _latch;
    private readonly CancellationToken _cancel;
    private readonly Action _waitForCause;
    private readonly IDisposable _shut;
    private readonly long[] _pages = new long[MultifdPacket.PagesAllocated];
    private RamBlock? _block;
    private int _count;
    private int _next;
    private long _number;
    private long _bytes;
    private bool _hasUnsynced;

    /// <summary>Starts the threads; each sends the preamble of its channel at once.</summary>
    /// <param name="channels">Connected channels; owned.</param>
    /// <param name="uuid">The VM's.</param>
    /// <param name="latch">Takes the first failure and shuts the channels.</param>
    /// <param name="waitForCause">Called before the failure of a channel goes into the latch: the destination may be saying why on the main channel.</param>
    /// <param name="cancel">Fires with the latch.</param>
    internal MultifdSender(IReadOnlyList<IMigrationChannel> channels, Guid uuid, FaultLatch latch, Action waitForCause, CancellationToken cancel)
    {
        (_latch, _cancel, _waitForCause) = (latch, cancel, waitForCause);
        _links = [.. channels.Select(static c => new Link(c))];
        _shut = latch.OnSet(() =>
        {
            foreach (Link link in _links) link.Channel.Shutdown(ChannelShutdown.Both);
        });
        for (int i = 0; i < _links.Length; i++)
        {
            Link link = _links[i];
            byte id = (byte)i;
            link.Thread = WorkerThread.Run($"mig/src/send_{i}", () => Send(link, MultifdPacket.Preamble(uuid, id)));
        }
    }

    /// <summary>The channels.</summary>
    internal IEnumerable<IMigrationChannel> Channels => _links.Select(static l => l.Channel);

    /// <summary>Bytes handed to channels.</summary>
    internal long Bytes => Interlocked.Read(ref _bytes);

    /// <summary>Adds a page to the packet that is being filled.</summary>
    public void AddPage(RamBlock block, long page)
    {
        if (!ReferenceEquals(block, _block)) FlushPages();
        _block = block;
        _pages[_count++] = page;
        if (_count == _pages.Length) FlushPages();
    }

    public bool Sync(bool always)
    {
        FlushPages();
        if (!always && !_hasUnsynced) return false;
        _hasUnsynced = false;
        foreach (Link link in _links) Queue(link, new Packet(MultifdPacket.Pages(null, [], NextNumber()), null, [], null));
        return true;
    }

    public void SendState(string idStr, int instanceId, StateBuffer buffer) =>
        Queue(Next(), new Packet(MultifdPacket.State(idStr, instanceId, buffer.Length), null, [], buffer));

    /// <summary>Waits until the channels have taken everything. Throws what went wrong.</summary>
    internal void Finish()
    {
        foreach (Link link in _links) link.Queue.CompleteAdding();
        foreach (Link link in _links) link.Thread!.GetAwaiter().GetResult();
        _latch.ThrowIfSet();
    }

    /// <summary>Ends threads and channels, whether the migration succeeded or not.</summary>
    public void Dispose()
    {
        foreach (Link link in _links) link.Queue.CompleteAdding();
        Task.WaitAll([.. _links.Select(static l => l.Thread!)]);
        _shut.Dispose();
        foreach (Link link in _links)
        {
            link.Channel.Dispose();
            link.Queue.Dispose();
        }
    }

    private void FlushPages()
    {
        if (_count == 0) return;
        long[] pages = _pages[.._count];
        Queue(Next(), new Packet(MultifdPacket.Pages(_block!, pages, NextNumber()), _block, pages, null));
        _count = 0;
        _hasUnsynced = true;
    }

    private Link Next() => _links[(uint)Interlocked.Increment(ref _next) % _links.Length];

    private ulong NextNumber() => (ulong)Interlocked.Increment(ref _number) - 1;

    private void Queue(Link link, Packet packet)
    {
        try
        {
            link.Queue.Add(packet, _cancel);
        }
        catch (Exception e) when (e is OperationCanceledException or InvalidOperationException)
        {
            packet.State?.Dispose();
            _latch.ThrowIfSet();
            throw;
        }
    }

    private void Send(Link link, byte[] preamble)
    {
        try
        {
            link.Channel.Write(preamble);
            using var list = new GatherList();
            foreach (Packet packet in link.Queue.GetConsumingEnumerable(_cancel))
            {
                list.Append(packet.Header);
                AppendRuns(list, packet);
                link.Channel.WriteGather(list);
                Interlocked.Add(ref _bytes, packet.Header.Length + ((long)packet.Pages.Length * RamBlock.PageSize) + (packet.State?.Length ?? 0));
                if (packet.State is not { } state) continue;
                link.Channel.Write(state.Span);
                state.Dispose();
            }
        }
#pragma warning disable CA1031 // The latch keeps it; the thread that waits for this one asks the latch.
        catch (Exception e)
#pragma warning restore CA1031
        {
            if (e is ChannelException) _waitForCause();
            _latch.Set(e);
        }
    }

    private static void AppendRuns(GatherList list, Packet packet)
    {
        for (int i = 0; i < packet.Pages.Length;)
        {
            int n = 1;
            while (i + n < packet.Pages.Length && packet.Pages[i + n] == packet.Pages[i] + n) n++;
            packet.Block!.AppendTo(list, (ulong)packet.Pages[i] * RamBlock.PageSize, n * RamBlock.PageSize);
            i += n;
        }
    }

    private sealed record Packet(byte[] Header, RamBlock? Block, long[] Pages, StateBuffer? State);

    private sealed class Link(IMigrationChannel channel)
    {
        internal IMigrationChannel Channel { get; } = channel;

        internal BlockingCollection<Packet> Queue { get; } = new(WaitingPackets);

        internal Task? Thread { get; set; }
    }
}
