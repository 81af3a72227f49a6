using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Migration.Attempts;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// The last phase: finds out whether the destination has the VM. With a return path the destination's SHUT says so, and this side answers with its final word.
/// Without one a socket shows whether the peer took every byte and closed in good order; a file for another process must be on disk; a command must have
/// succeeded.
/// </summary>
internal static class Confirmation
{
    private static readonly TimeSpan s_step = TimeSpan.FromMilliseconds(200);

    private static readonly TimeSpan s_peerEnd = TimeSpan.FromSeconds(1), s_sync = TimeSpan.FromSeconds(30);

    /// <summary>Waits for the end that the peer gives the attempt.</summary>
    /// <returns>True if the destination is known to have everything it needs to run; false if this side's last message may not have arrived.</returns>
    internal static bool Wait(OutgoingAttempt attempt, OutgoingLink link)
    {
        attempt.Phase = "confirm";
        if (link.ReturnPath is { } returnPath) return WaitAnswer(attempt, link, returnPath);
        try
        {
            WaitEnd(attempt, link);
        }
        catch (VmmException) when (!attempt.Latch.IsSet)
        {
            attempt.HandOver.On(SourceEvent.Refused);
            throw;
        }
        return true;
    }

    private static bool WaitAnswer(OutgoingAttempt attempt, OutgoingLink link, ReturnPathReader returnPath)
    {
        HandOver handOver = attempt.HandOver;
        long start = Stopwatch.GetTimestamp();
        while (true)
        {
            ReturnPathEnd end = returnPath.WaitEnd(s_step);
            if (end == ReturnPathEnd.Confirmed) break;
            if (end != ReturnPathEnd.Open)
            {
                handOver.On(EventOf(end));
                throw returnPath.Failure!;
            }
            // A latch that is set has shut the channel, so the return path ends soon; what it says decides, if this side does not.
            if (attempt.Latch.IsSet && handOver.HasFinalWord) attempt.Latch.ThrowIfSet();
            TimeSpan limit = TimeSpan.FromMilliseconds(attempt.Vm.Parameters.Current.ConfirmTimeoutMs);
            if (Stopwatch.GetElapsedTime(start) < limit) continue;
            handOver.On(SourceEvent.Silent);
            throw new ChannelException($"{link.Channel.Name}: the destination has everything and has not confirmed within {limit.TotalSeconds:0.#} s", Errno.ETIMEDOUT)
            {
                Hint = "parameter x-confirm-timeout sets this deadline",
            };
        }
        // A destination that waited in vain for the final word closes. It does not run, so the VM need not go.
        if (handOver.HasFinalWord && link.Channel.PeerHasClosed)
        {
            handOver.On(SourceEvent.PeerClosed);
            throw new ChannelException($"{link.Channel.Name}: the destination confirmed, waited for this side and gave up", Errno.ECONNRESET);
        }
        if (handOver.On(SourceEvent.Confirmed) != SourceStage.Moved) throw attempt.Latch.Reason ?? new OperationCanceledException("the migration was cancelled");
        return !handOver.HasFinalWord || link.SendReleased();
    }

    internal static SourceEvent EventOf(ReturnPathEnd end) => end switch
    {
        ReturnPathEnd.Confirmed => SourceEvent.Confirmed,
        ReturnPathEnd.Refused => SourceEvent.Refused,
        ReturnPathEnd.Closed => SourceEvent.PeerClosed,
        _ => SourceEvent.Lost,
    };

    private static void WaitEnd(OutgoingAttempt attempt, OutgoingLink link)
    {
        switch (link.Channel)
        {
            case SocketChannel socket:
                if (socket.WaitPeerEnd(s_peerEnd) == PeerEnd.Reset)
                    throw new ChannelException($"{socket.Name}: the destination ended before it had read everything", Errno.ECONNRESET);
                break;
            case ExecChannel exec:
                if (!exec.Drain(s_sync)) throw new ChannelException($"{exec.Name}: the command did not end within 30 s", Errno.ETIMEDOUT);
                break;
            case FileChannel when attempt.Plan.Mode == MigrationMode.CprExec:
                break; // This process reads the file itself. If the host loses power RAM is lost too, so the file need not be on disk.
            default:
                link.Channel.Drain(s_sync);
                break;
        }
        attempt.Latch.ThrowIfSet();
        // The channel's own end confirms; a cancel comes too late from here on. An exec is still to come, and can fail.
        if (attempt.Plan.Mode != MigrationMode.CprExec && attempt.HandOver.On(SourceEvent.Confirmed) != SourceStage.Moved)
            throw attempt.Latch.Reason ?? new OperationCanceledException("the migration was cancelled");
    }
}
