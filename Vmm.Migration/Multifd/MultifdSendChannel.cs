using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Multifd;

/// <summary>
/// One channel of the source: takes jobs and sends them (QEMU: <c>multifd_send_thread</c>). Looks for zero pages just before it sends the others, so that
/// they are read from memory once. One thread.
/// </summary>
internal sealed class MultifdSendChannel : IDisposable
{
    private readonly MultifdSettings _settings;
    private readonly SendQueue _queue;
    private readonly Func<ulong> _nextNumber;
    private readonly PageCompressor? _compressor;
    private readonly GatherList _list = new();
    private readonly long[] _zero = new long[MultifdPacket.PagesAllocated];
    private long _normalPages, _zeroPages, _bytes;

    /// <param name="channel">Connected; owned.</param>
    /// <param name="settings">The attempt's.</param>
    /// <param name="queue">Has the jobs.</param>
    /// <param name="nextNumber">Gives numbers to packets of pages and SYNCs; any thread.</param>
    internal MultifdSendChannel(IMigrationChannel channel, MultifdSettings settings, SendQueue queue, Func<ulong> nextNumber)
    {
        (Channel, _settings, _queue, _nextNumber) = (channel, settings, queue, nextNumber);
        _compressor = PageCompressor.Of(settings);
    }

    internal IMigrationChannel Channel { get; }

    /// <summary>The thread that runs <see cref="Run"/>.</summary>
    internal Task Thread { get; set; } = Task.CompletedTask;

    /// <summary>What the channel has sent. Any thread.</summary>
    internal SentPages Sent => new(Volatile.Read(ref _normalPages), Volatile.Read(ref _zeroPages), Volatile.Read(ref _bytes));

    /// <summary>Sends the preamble, then jobs until the queue ends.</summary>
    internal void Run(byte[] preamble)
    {
        Channel.Write(preamble);
        long round = 0;
        for (SendStep step; (step = _queue.Take(ref round, out SendJob? job)) != SendStep.End;)
        {
            if (job is null)
            {
                MultifdPacket.WriteSync(_list.Reserve(MultifdPacket.HeaderBytes), _nextNumber());
                Send();
                continue;
            }
            try
            {
                if (job.State is { } state) SendState(job, state);
                else SendPages(job.Block!, job.Pages.AsSpan(0, job.Count));
            }
            finally
            {
                _queue.Return(job);
            }
        }
    }

    public void Dispose()
    {
        Channel.Dispose();
        _list.Dispose();
        _compressor?.Dispose();
    }

    private void SendPages(RamBlock block, Span<long> pages)
    {
        (int normal, int zero) = Divide(block, pages);
        pages = pages[..normal];
        Span<byte> header = _list.Reserve(MultifdPacket.HeaderBytes);
        if (_compressor is null || normal == 0)
        {
            MultifdPacket.WritePages(header, block, pages, _zero.AsSpan(0, zero), _settings.Method, normal * RamBlock.PageSize, _nextNumber());
            // Neighbours become one range.
            foreach (long page in pages) block.AppendTo(_list, (ulong)page * RamBlock.PageSize, RamBlock.PageSize);
            Send();
        }
        else
        {
            ReadOnlySpan<byte> payload = _compressor.Compress(block, pages);
            MultifdPacket.WritePages(header, block, pages, _zero.AsSpan(0, zero), _settings.Method, payload.Length, _nextNumber());
            Send();
            Channel.Write(payload);
            Count(payload.Length);
        }
        Volatile.Write(ref _normalPages, _normalPages + normal);
        Volatile.Write(ref _zeroPages, _zeroPages + zero);
    }

    /// <summary>Moves the pages with content to the front, in their order, and the others to <see cref="_zero"/>.</summary>
    private (int Normal, int Zero) Divide(RamBlock block, Span<long> pages)
    {
        int normal = 0, zero = 0;
        foreach (long page in pages)
        {
            if (page < 0) _zero[zero++] = ~page;
            else if (_settings.DetectsZeroPages && block.IsZeroPage(page)) _zero[zero++] = page;
            else pages[normal++] = page;
        }
        return (normal, zero);
    }

    private void SendState(SendJob job, StateBuffer state)
    {
        MultifdPacket.WriteState(_list.Reserve(MultifdPacket.StateHeaderBytes), job.IdStr, job.InstanceId, state.Length);
        Send();
        Channel.Write(state.Span);
        Count(state.Length);
    }

    private void Send()
    {
        long bytes = _list.PendingBytes;
        Channel.WriteGather(_list);
        Count(bytes);
    }

    private void Count(long bytes) => Volatile.Write(ref _bytes, _bytes + bytes);
}
