using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Attempts;
using Vmm.Migration.Channels;
using Vmm.Migration.Multifd;
using Vmm.Migration.Ram;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Outgoing;

/// <summary>The connected channels of one outgoing migration and the stream on them. <see cref="EndSending"/> and then <see cref="Close"/> end it.</summary>
internal sealed class OutgoingLink : IDisposable
{
    private static readonly TimeSpan s_finalWord = TimeSpan.FromSeconds(1), s_answerStep = TimeSpan.FromMilliseconds(100);

    private readonly FaultLatch _latch;
    private readonly IDisposable _shut;

    private OutgoingLink(OutgoingAttempt attempt, IMigrationChannel channel, MultifdSender? sender)
    {
        (_latch, Channel, Sender) = (attempt.Latch, channel, sender);
        _shut = _latch.OnSet(() => channel.Shutdown(ChannelShutdown.Both));
        File = new QemuFileWriter(channel);
        Stream = new SaveStream(attempt.Vm.Vm.SaveVm, File, attempt.Plan.Context with { DataChannels = sender, Cancel = attempt.Cancel });
        if (attempt.Plan.HasReturnPath) ReturnPath = new ReturnPathReader(channel, _latch);
        attempt.WaitForCause = WaitForCause;
        Heartbeat = new Heartbeat(this);
        Watch = new ProgressWatch(attempt, this);
    }

    internal IMigrationChannel Channel { get; }

    /// <summary>Sends over the channels of multifd; null without.</summary>
    internal MultifdSender? Sender { get; }

    internal QemuFileWriter File { get; }

    internal SaveStream Stream { get; }

    /// <summary>Null without a return path.</summary>
    internal ReturnPathReader? ReturnPath { get; }

    /// <summary>
    /// What the destination will say when it has everything; null for a channel that goes one way, such as a file or a command. Nobody reads a file before the
    /// attempt has ended, and a command has failed as long as it has not ended well.
    /// </summary>
    internal SourcePeer? Peer => ReturnPath switch
    {
        { PeerWaitsForFinalWord: true } => SourcePeer.WaitsForFinalWord,
        not null => SourcePeer.Confirms,
        null => Channel.IsBidirectional ? SourcePeer.SaysNothing : null,
    };

    internal Heartbeat Heartbeat { get; }

    internal ProgressWatch Watch { get; }

    /// <summary>The attempt's RAM figures; all 0 before <c>SavePrepare</c>.</summary>
    internal RamFigures Ram => Stream.Find<RamSave>()?.Figures ?? RamFigures.None;

    /// <summary>
    /// Connects all channels to the same address. Each sends its first bytes at once, because a destination waits for them (stream 14.2, 14.3).
    /// </summary>
    /// <param name="attempt">The attempt.</param>
    /// <param name="channel">The main channel if there is one already; the link owns it from then on, even when this throws.</param>
    internal static OutgoingLink Open(OutgoingAttempt attempt, IMigrationChannel? channel)
    {
        var data = new List<IMigrationChannel>();
        MultifdSender? sender = null;
        try
        {
            channel ??= MigrationConnector.Connect(attempt.Plan.Address!, attempt.Wake);
            if (attempt.Plan.Multifd is { } multifd)
            {
                while (data.Count < multifd.Channels) data.Add(MigrationConnector.Connect(attempt.Plan.Address!, attempt.Wake));
                sender = new MultifdSender(data, multifd, attempt.Vm.Vm.Uuid, attempt.Latch, () => attempt.WaitForCause());
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

    /// <summary>
    /// Waits for the destination's first answer: a guest is never stopped for a destination that may be busy with another migration. <see cref="Watch"/> sets the
    /// deadline. Returns at once without a return path.
    /// </summary>
    internal void WaitAnswered()
    {
        while (ReturnPath is { } path && !path.WaitAnswered(s_answerStep)) _latch.ThrowIfSet();
    }

    /// <summary>Waits a moment for the return path after a failed write: a destination often says why it fails, then closes.</summary>
    internal void WaitForCause()
    {
        if (ReturnPath is not { IsStarted: true } || _latch.IsSet) return;
        Channel.Shutdown(ChannelShutdown.Write);
        ReturnPath.WaitEnd(TimeSpan.FromMilliseconds(500));
    }

    /// <summary>Shuts the channel, so that nothing more can arrive.</summary>
    /// <returns>What the destination's answer was.</returns>
    internal ReturnPathEnd EndAnswer()
    {
        Channel.Shutdown(ChannelShutdown.Both);
        ReturnPath!.Completion.Wait();
        return ReturnPath.WaitEnd(TimeSpan.Zero);
    }

    /// <summary>Tells the destination that this side has let the VM go. The VM is there from now on, whether the word arrives or not.</summary>
    /// <returns>False if the word may not have arrived.</returns>
    internal bool SendReleased()
    {
        try
        {
            File.WriteCommand(MigCommand.VmmReleased);
            File.Flush();
            return Channel.Drain(s_finalWord);
        }
        catch (ChannelException)
        {
            return false;
        }
    }

    /// <summary>Tells the destination that this side keeps the VM, if the channel takes that at once. Any thread; the stream must have ended.</summary>
    internal void TryWithdraw()
    {
        ReadOnlySpan<byte> command = [(byte)SectionType.Command, (ushort)MigCommand.VmmWithdrawn >> 8, (ushort)MigCommand.VmmWithdrawn & 0xff, 0, 0];
        (Channel as SocketChannel)?.TrySend(command);
    }

    /// <summary>Ends the threads that send. A latch that is set afterwards does not shut the channel any more.</summary>
    internal void EndSending()
    {
        Watch.Dispose();
        Stream.JoinThreads();
        Sender?.Dispose();
        _shut.Dispose();
    }

    /// <summary>Closes the channel; with <paramref name="isDone"/> false what was written is discarded.</summary>
    internal void Close(bool isDone)
    {
        if (!isDone && Channel is FileChannel file) file.Abandon();
        // Closing does not wake the return path's thread, which blocks in a read of this descriptor; a shutdown does.
        if (!isDone) Channel.Shutdown(ChannelShutdown.Both);
        Channel.Dispose();
        ReturnPath?.Completion.Wait();
    }

    public void Dispose() => File.Dispose();
}
