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

    private readonly MultifdReceiveChannel[] _links;
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
    /// <param name="settings">The compression; the source must have the same.</param>
    /// <param name="uuid">The VM's; the source must have the same.</param>
    /// <param name="latch">Takes the first failure.</param>
    internal MultifdReceiver(IReadOnlyList<IMigrationChannel> channels, MultifdSettings settings, Guid uuid, FaultLatch latch)
    {
        (_uuid, _latch) = (uuid, latch);
        _links = [.. channels.Select(c => new MultifdReceiveChannel(c, settings))];
        _open = _links.Length;
        _shut = latch.OnSet(() =>
        {
            _cancel.Cancel();
            // A source that is told by its main channel closes these itself; Dispose waits for that.
            foreach (MultifdReceiveChannel link in _links.Where(static l => l.Channel is not SocketChannel)) link.Channel.Shutdown(ChannelShutdown.Both);
        });
    }

    /// <summary>True while the load waits for what must come over these channels. Any thread.</summary>
    internal bool IsWaiting => _isWaiting;

    /// <summary>True when device state may come over these channels, too.</summary>
    internal bool CarriesState => _links.Length > 0 && _links[0].CarriesState;

    /// <summary>Bytes that have come over the main channel; 0 if nobody counts them.</summary>
    internal Func<long> MainReceived { get; init; } = static () => 0;

    /// <summary>Starts the threads.</summary>
    /// <param name="stream">Its RAM and devices take what comes; set up already.</param>
    internal void Start(LoadStream stream)
    {
        (_stream, _pages) = (stream, stream.Pages);
        for (int i = 0; i < _links.Length; i++)
        {
            MultifdReceiveChannel link = _links[i];
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
            foreach (MultifdReceiveChannel link in _links)
            {
                WaitReached(link);
                if (Volatile.Read(ref link.Packets.Syncs) < _rounds) throw new ChannelException($"{link.Channel.Name}: a channel of multifd ended before its sync {_rounds}", Errno.ECONNRESET);
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
        foreach (MultifdReceiveChannel link in _links) link.Go.Release();
    }

    private void WaitReached(MultifdReceiveChannel link)
    {
        for (long received = -1; !link.Reached.Wait(s_syncTimeout, _cancel.Token);)
        {
            long now = link.Received;
            if (now == received) throw new ChannelException($"{link.Channel.Name}: nothing came on a channel of multifd for {s_syncTimeout.TotalSeconds:0} s before its sync {_rounds}", Errno.ETIMEDOUT);
            received = now;
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
        foreach (MultifdReceiveChannel link in _links)
        {
            int syncs = Volatile.Read(ref link.Packets.Syncs);
            if (syncs != _rounds) throw Incomplete(link, $"{_rounds} SYNCs as in the main channel", $"{syncs}");
            if (link.Packets.HasUnsynced || (endsAtSync && link.Channel is SocketChannel socket && socket.HasUnread())) throw Incomplete(link, "nothing after its last SYNC", "more");
            packets += Interlocked.Read(ref link.Packets.Numbered);
            next = Math.Max(next, Interlocked.Read(ref link.Packets.NextNumber));
        }
        if (packets == next || !endsAtSync) return;
        throw new IncompatibleStateException($"the source sent {next} packets over multifd, {packets} of them over the {_links.Length} channels that are expected here: it opened more")
        {
            Section = "multifd", Expected = $"{next}", Found = $"{packets}", Hint = $"set parameter multifd-channels to {_links.Length} on the source",
        };
    }

    private static IncompatibleStateException Incomplete(MultifdReceiveChannel link, string expected, string found) =>
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
            MultifdReceiveChannel link = _links[i];
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
        foreach (MultifdReceiveChannel link in _links) link.Channel.Shutdown(ChannelShutdown.Both);
        Task.WaitAll([.. _links.Select(static l => l.Thread ?? Task.CompletedTask)]);
        _shut.Dispose();
        foreach (MultifdReceiveChannel link in _links) link.Dispose();
        _cancel.Dispose();
    }

    private void Receive(MultifdReceiveChannel link)
    {
        try
        {
            byte id = link.ReadPreamble(_uuid, _links.Length);
            lock (_gate)
                if (!_ids.Add(id)) throw link.SameId(id, _links.Length);
            // A source that has sent everything closes its channels.
            while (link.HasMore)
            {
                _latch.ThrowIfSet();
                bool synced = link.ReadPacket(_stream!, _pages);
                Interlocked.Increment(ref link.Packets.Arrived);
                if (synced) WaitGo(link);
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

    private void WaitGo(MultifdReceiveChannel link)
    {
        link.Packets.HasUnsynced = false;
        int sync = Interlocked.Increment(ref link.Packets.Syncs);
        link.Reached.Release();
        // On a slow network the other channels may have much to bring before theirs.
        for (long received = -1; !link.Go.Wait(s_syncTimeout, _cancel.Token);)
        {
            long now = MainReceived() + _links.Sum(static l => l.Received);
            if (now == received)
                throw new ChannelException($"{link.Channel.Name}: the main channel's mark for sync {sync} of a multifd channel has not come, and nothing has for {s_syncTimeout.TotalSeconds:0} s", Errno.ETIMEDOUT);
            received = now;
        }
    }

    private void EndBuffers()
    {
        foreach (ILoadStateBuffer buffers in _stream!.AllBuffers()) buffers.NoMoreBuffers();
    }
}
