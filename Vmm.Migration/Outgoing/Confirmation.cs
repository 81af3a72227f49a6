using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// The last phase: finds out whether the destination has the VM. With a return path the destination's SHUT says so. Without one a socket shows whether the
/// peer took every byte and closed in good order; a file for another process must be on disk; a command must have succeeded.
/// </summary>
internal static class Confirmation
{
    private static readonly TimeSpan s_step = TimeSpan.FromMilliseconds(200);

    private static readonly TimeSpan s_peerEnd = TimeSpan.FromSeconds(1), s_sync = TimeSpan.FromSeconds(30);

    internal static void Wait(OutgoingAttempt attempt, OutgoingLink link)
    {
        attempt.Phase = "confirm";
        if (link.ReturnPath is { } returnPath) WaitAnswer(attempt, returnPath);
        else WaitEnd(attempt, link);
    }

    private static void WaitAnswer(OutgoingAttempt attempt, ReturnPathReader returnPath)
    {
        while (true)
        {
            bool cancel = attempt.HandOver.IsCancelAsked;
            ReturnPathEnd end = returnPath.WaitEnd(cancel ? attempt.Plan.LastWord : s_step);
            if (end == ReturnPathEnd.Confirmed) return;
            if (cancel || (end == ReturnPathEnd.Failed && attempt.HandOver.IsCancelAsked)) throw new OperationCanceledException("the migration was cancelled");
            if (end == ReturnPathEnd.Failed) throw returnPath.Failure!;
            attempt.Latch.ThrowIfSet();
        }
    }

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
    }
}
