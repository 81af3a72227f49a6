using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>The end of a move that failed.</summary>
internal enum SpliceSide
{
    /// <summary>Neither end failed.</summary>
    None,
    /// <summary>The source; its end of stream counts as ECONNRESET.</summary>
    From,
    /// <summary>The target.</summary>
    To,
}

/// <summary>Result of a move.</summary>
/// <param name="TakenBytes">Bytes taken from the source.</param>
/// <param name="DeliveredBytes">Bytes that reached the target; all other taken bytes are lost.</param>
/// <param name="FailedSide">The end that failed.</param>
/// <param name="Errno">Reason of the failure.</param>
internal readonly record struct SpliceResult(int TakenBytes, int DeliveredBytes, SpliceSide FailedSide, Errno Errno);

/// <summary>Moves bytes from one socket to another inside the kernel, without copying them (splice(2)). One thread at a time.</summary>
internal sealed class SplicePipe : IDisposable
{
    private const int CapacityBytes = 1 << 20;

    private OwnedFd _read, _write;

    internal SplicePipe() => (_read, _write) = Open();

    /// <summary>Moves <paramref name="count"/> bytes between two stream sockets in blocking mode. Blocks; a shutdown of either socket ends the move.</summary>
    internal SpliceResult MoveBytes(OwnedFd from, OwnedFd to, int count)
    {
        int taken = 0, delivered = 0;
        while (taken < count)
        {
            int n = Posix.Splice(from, _write, count - taken, out Errno errno);
            if (n <= 0) return new SpliceResult(taken, delivered, SpliceSide.From, n == 0 ? Errno.ECONNRESET : errno);
            taken += n;
            while (delivered < taken)
            {
                n = Posix.Splice(_read, to, taken - delivered, out errno);
                if (n > 0) { delivered += n; continue; }
                Reset();
                return new SpliceResult(taken, delivered, SpliceSide.To, n == 0 ? Errno.EPIPE : errno);
            }
        }
        return new SpliceResult(taken, delivered, SpliceSide.None, Errno.None);
    }

    public void Dispose()
    {
        _read.Dispose();
        _write.Dispose();
    }

    /// <summary>Replaces the pipe after a failed move, because the bytes left in it must not reach the next target.</summary>
    private void Reset()
    {
        Dispose();
        (_read, _write) = Open();
    }

    private static (OwnedFd Read, OwnedFd Write) Open()
    {
        (OwnedFd Read, OwnedFd Write) pipe = Posix.Pipe();
        // The kernel may refuse an unprivileged user; a smaller pipe works too, with more calls.
        Posix.SetPipeSize(pipe.Write, CapacityBytes);
        return pipe;
    }
}
