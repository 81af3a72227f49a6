using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;

namespace Vmm.Migration.Multifd;

/// <summary>
/// The source's channels, one thread each (stream 4): they carry pages of RAM, SYNCs and buffers of device state. Pages and SYNCs come from one thread,
/// buffers of devices from any. Memory is bounded by <see cref="SendQueue"/>.
/// </summary>
internal sealed class MultifdSender : IDataChannels, IDisposable
{
    private readonly MultifdSendChannel[] _channels;
    private readonly SendQueue _queue;
    private readonly FaultLatch _latch;
    private readonly Action _waitForCause;
    private readonly IDisposable _shut;
    private SendJob? _job;
    private long _number;
    private bool _hasUnsynced;

    /// <summary>Starts the threads; each sends the preamble of its channel at once.</summary>
    /// <param name="channels">Connected channels; owned.</param>
    /// <param name="settings">Compression and zero pages.</param>
    /// <param name="uuid">The VM's.</param>
    /// <param name="latch">Takes the first failure and shuts the channels.</param>
    /// <param name="waitForCause">Called before the failure of a channel goes into the latch: the destination may be saying why on the main channel.</param>
    internal MultifdSender(IReadOnlyList<IMigrationChannel> channels, MultifdSettings settings, Guid uuid, FaultLatch latch, Action waitForCause)
    {
        (_latch, _waitForCause) = (latch, waitForCause);
        (CarriesState, DetectsZeroPages) = (settings.CarriesState, settings.DetectsZeroPages);
        _queue = new SendQueue(channels.Count);
        _channels = [.. channels.Select(c => new MultifdSendChannel(c, settings, _queue, () => (ulong)Interlocked.Increment(ref _number) - 1))];
        _shut = latch.OnSet(() =>
        {
            _queue.Abort();
            foreach (MultifdSendChannel channel in _channels) channel.Channel.Shutdown(ChannelShutdown.Both);
        });
        for (int i = 0; i < _channels.Length; i++)
        {
            MultifdSendChannel channel = _channels[i];
            byte id = (byte)i;
            channel.Thread = WorkerThread.Run($"mig/src/send_{i}", () => Send(channel, MultifdPacket.Preamble(uuid, id)));
        }
    }

    /// <summary>The channels.</summary>
    internal IEnumerable<IMigrationChannel> Channels => _channels.Select(static c => c.Channel);

    public bool CarriesState { get; }

    public bool DetectsZeroPages { get; }

    public SentPages Sent
    {
        get
        {
            var all = default(SentPages);
            foreach (MultifdSendChannel channel in _channels)
            {
                SentPages one = channel.Sent;
                all = new SentPages(all.NormalPages + one.NormalPages, all.ZeroPages + one.ZeroPages, all.Bytes + one.Bytes);
            }
            return all;
        }
    }

    public void AddPage(RamBlock block, long page, bool isZero)
    {
        if (_job is { } open && !ReferenceEquals(block, open.Block)) FlushPages();
        SendJob job = _job ??= _queue.Rent();
        job.Block = block;
        job.Pages[job.Count++] = isZero ? ~page : page;
        if (job.Count == job.Pages.Length) FlushPages();
    }

    public bool Sync(bool always)
    {
        FlushPages();
        if (!always && !_hasUnsynced) return false;
        _hasUnsynced = false;
        _queue.Sync();
        return true;
    }

    public void SendState(string idStr, int instanceId, StateBuffer buffer)
    {
        SendJob job = _queue.Rent();
        (job.IdStr, job.InstanceId, job.State) = (idStr, instanceId, buffer);
        Queue(job);
    }

    /// <summary>Waits until the channels have taken everything. Throws what went wrong.</summary>
    internal void Finish()
    {
        _queue.Complete();
        foreach (MultifdSendChannel channel in _channels) channel.Thread.GetAwaiter().GetResult();
        _latch.ThrowIfSet();
    }

    /// <summary>Ends threads and channels, whether the migration succeeded or not.</summary>
    public void Dispose()
    {
        _queue.Complete();
        Task.WaitAll([.. _channels.Select(static c => c.Thread)]);
        _queue.Abort();
        _shut.Dispose();
        foreach (MultifdSendChannel channel in _channels) channel.Dispose();
    }

    private void FlushPages()
    {
        if (_job is not { Count: > 0 } job) return;
        _job = null;
        _hasUnsynced = true;
        Queue(job);
    }

    private void Queue(SendJob job)
    {
        if (_queue.Add(job)) return;
        _queue.Return(job);
        _latch.ThrowIfSet();
        throw new OperationCanceledException();
    }

    private void Send(MultifdSendChannel channel, byte[] preamble)
    {
        try
        {
            channel.Run(preamble);
        }
#pragma warning disable CA1031 // The latch keeps it; the thread that waits for this one asks the latch.
        catch (Exception e)
#pragma warning restore CA1031
        {
            if (e is ChannelException) _waitForCause();
            _latch.Set(e);
        }
    }
}
