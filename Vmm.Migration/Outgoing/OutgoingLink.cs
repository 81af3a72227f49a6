using Vmm.Core.Channels;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;
using Vmm.Migration.Multifd;
using Vmm.Migration.Ram;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Outgoing;

/// <summary>The connected channels of one outgoing migration and the stream on them. It is ended by <see cref="EndSending"/> and <see cref="Close"/>.</summary>
internal sealed class OutgoingLink : IDisposable
{
    private readonly FaultLatch _latch;
    private readonly IDisposable _shut;

    private OutgoingLink(OutgoingAttempt attempt, IMigrationChannel channel, MultifdSender? sender)
    {
        (_latch, Channel, Sender) = (attempt.Latch, channel, sender);
        _shut = _latch.OnSet(() => channel.Shutdown(ChannelShutdown.Both));
        File = new QemuFileWriter(channel);
        Stream = new SaveStream(attempt.Vm.Vm.SaveVm, File, attempt.Plan.Context with { DataChannels = sender, Cancel = attempt.Cancel });
        if (attempt.Plan.HasReturnPath) ReturnPath = new ReturnPathReader(channel, _latch);
    }

    internal IMigrationChannel Channel { get; }

    /// <summary>Channels of multifd; null without.</summary>
    internal MultifdSender? Sender { get; }

    internal QemuFileWriter File { get; }

    internal SaveStream Stream { get; }

    /// <summary>Null without a return path.</summary>
    internal ReturnPathReader? ReturnPath { get; }

    /// <summary>The attempt's figures of RAM; those of nothing before it was prepared.</summary>
    internal RamFigures Ram => Stream.Find<RamSave>()?.Figures ?? RamFigures.None;

    /// <summary>Connects all channels to the same address; each sends its first bytes at once, since a destination waits for them (stream 14.2, 14.3).</summary>
    /// <param name="attempt">The attempt.</param>
    /// <param name="channel">The main channel, if there is one already; the link's from here on, also on failure.</param>
    internal static OutgoingLink Open(OutgoingAttempt attempt, IMigrationChannel? channel)
    {
        var data = new List<IMigrationChannel>();
        MultifdSender? sender = null;
        try
        {
            channel ??= MigrationConnector.Connect(attempt.Plan.Address!, attempt.Wake);
            if (attempt.Plan.HasMultifd)
            {
                while (data.Count < MultifdPacket.Channels) data.Add(MigrationConnector.Connect(attempt.Plan.Address!, attempt.Wake));
                sender = new MultifdSender(data, attempt.Vm.Vm.Uuid, attempt.Latch, attempt.Cancel);
            }
            return new OutgoingLink(attempt, channel, sender);
        }
        catch (Exception e)
        {
            attempt.Latch.Set(e);
            if (sender is null) data.ForEach(static c => c.Dispose());
            sender?.Dispose();
            if (channel is FileChannel file) file.Abandon();
            channel?.Dispose();
            throw;
        }
    }

    /// <summary>A failed write often has its cause in the return path: the destination says why, then closes.</summary>
    internal void WaitForCause()
    {
        if (ReturnPath is not { IsStarted: true } || _latch.IsSet) return;
        Channel.Shutdown(ChannelShutdown.Write);
        ReturnPath.WaitEnd(TimeSpan.FromMilliseconds(500));
    }

    /// <summary>Whether the destination had confirmed before the channel was shut; after that it can say nothing more.</summary>
    internal bool WasConfirmed()
    {
        if (ReturnPath is null) return false;
        Channel.Shutdown(ChannelShutdown.Both);
        ReturnPath.Completion.Wait();
        return ReturnPath.WaitEnd(TimeSpan.Zero) == ReturnPathEnd.Confirmed;
    }

    /// <summary>Ends the threads that send. What was sent well stays so when the latch is set afterwards.</summary>
    internal void EndSending()
    {
        Stream.JoinThreads();
        Sender?.Dispose();
        _shut.Dispose();
    }

    /// <summary>Ends the channel.</summary>
    /// <param name="isDone">False: what was written is worth nothing.</param>
    internal void Close(bool isDone)
    {
        if (!isDone && Channel is FileChannel file) file.Abandon();
        // A descriptor that the return path's reader is blocked on stays open when it is closed; only a shutdown wakes the reader.
        if (!isDone) Channel.Shutdown(ChannelShutdown.Both);
        Channel.Dispose();
        ReturnPath?.Completion.Wait();
    }

    public void Dispose() => File.Dispose();
}
