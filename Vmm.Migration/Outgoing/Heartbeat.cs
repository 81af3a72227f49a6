using System.Diagnostics;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// The PINGs of one outgoing migration. While there is nothing to send, one goes out every two seconds, so that each side notices that the other is gone.
/// Written by the migration's thread, read by the <see cref="ProgressWatch"/>.
/// </summary>
internal sealed class Heartbeat(OutgoingLink link)
{
    private static readonly TimeSpan s_interval = TimeSpan.FromSeconds(2);

    private long _sentAt = Stopwatch.GetTimestamp();
    private uint _sent = 1;

    /// <summary>How long an answer is missing; zero when all PINGs are answered.</summary>
    internal TimeSpan Unanswered => link.ReturnPath is { } path && path.LastPong < Volatile.Read(ref _sent) ? Stopwatch.GetElapsedTime(Volatile.Read(ref _sentAt)) : TimeSpan.Zero;

    /// <summary>Sends the next PING and everything queued before it.</summary>
    /// <returns>Its number, which the PONG has too.</returns>
    internal uint Send()
    {
        bool isFirstUnanswered = link.ReturnPath!.LastPong >= _sent;
        link.File.WritePing(_sent + 1);
        if (isFirstUnanswered) Volatile.Write(ref _sentAt, Stopwatch.GetTimestamp());
        Volatile.Write(ref _sent, _sent + 1);
        link.File.Flush();
        return _sent;
    }

    /// <summary>Sends a PING if the last one is answered and two seconds old. Does nothing without a return path.</summary>
    internal void SendIfDue()
    {
        if (link.ReturnPath is { } path && path.LastPong >= _sent && Stopwatch.GetElapsedTime(_sentAt) > s_interval) Send();
    }

    /// <summary>Waits for an event with PINGs meanwhile.</summary>
    internal void Wait(ManualResetEventSlim until)
    {
        // In short steps: after a wait that ends a moment early, the next PING would come a whole interval late.
        while (!until.Wait(s_interval / 8)) SendIfDue();
    }
}
