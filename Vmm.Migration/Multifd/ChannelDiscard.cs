using System.Diagnostics;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Multifd;

/// <summary>
/// Reads channels of a source whose load has failed to their ends and throws away what comes. A source that is held up in one of them does not learn of the
/// failure; and QEMU 10.0 waits under its BQL for channels that break during its setup, and then its guest never runs again.
/// </summary>
internal static class ChannelDiscard
{
    /// <summary>Longest wait for a source that has been told of the failure to close its channels.</summary>
    internal static readonly TimeSpan Limit = TimeSpan.FromSeconds(1);

    private const int ScratchBytes = 64 << 10;

    /// <summary>Reads one channel until it ends or fails, on the caller's thread.</summary>
    internal static void ReadToEnd(IMigrationChannel channel)
    {
        byte[] scratch = new byte[ScratchBytes];
        while (ReadSome(channel, scratch))
        {
        }
    }

    /// <summary>Reads channels until all of them have ended, for at most <see cref="Limit"/>, and closes them.</summary>
    /// <param name="channels">Owned; nobody else reads them.</param>
    internal static void ReadToEndAndClose(IReadOnlyList<SocketChannel> channels)
    {
        using var events = new Epoll();
        using OwnedFd never = Posix.EventFd();
        byte[] scratch = new byte[ScratchBytes];
        Span<ulong> ready = stackalloc ulong[64];
        for (int i = 0; i < channels.Count; i++) events.Add(channels[i].Descriptor!, (ulong)i);
        int open = channels.Count;
        for (long from = Stopwatch.GetTimestamp(); open > 0 && (Limit - Stopwatch.GetElapsedTime(from)).TotalMilliseconds is var leftMs and > 0;)
        {
            foreach (ulong key in ready[..events.Wait(ready, never, (int)Math.Ceiling(leftMs), out _)])
            {
                SocketChannel channel = channels[(int)key];
                if (ReadSome(channel, scratch)) continue;
                events.Remove(channel.Descriptor!);
                open--;
            }
        }
        foreach (SocketChannel channel in channels) channel.Dispose();
    }

    private static bool ReadSome(IMigrationChannel channel, byte[] scratch)
    {
        try
        {
            return channel.Read(scratch) > 0;
        }
        catch (VmmException)
        {
            // The source is gone, or its channel was shut.
            return false;
        }
    }
}
