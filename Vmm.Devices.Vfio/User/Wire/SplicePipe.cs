using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>Which end of a move failed.</summary>
internal enum SpliceSide
{
    /// <summary>None.</summary>
    None,
    /// <summary>The end read from; an end of file counts, as ECONNRESET.</summary>
    From,
    /// <summary>The end written to.</summary>
    To,
}

/// <summary>How a move ended.</summary>
/// <param name="TakenBytes">Bytes taken from the source.</param>
/// <param name="DeliveredBytes">Bytes that reached the target; what was taken and not delivered is lost.</param>
/// <param name="FailedSide">Which end failed.</param>
/// <param name="Errno">Why.</param>
internal readonly record struct SpliceResult(int TakenBytes, int DeliveredBytes, SpliceSide FailedSide, Errno Errno);

/// <summary>Moves bytes from one socket to another inside the kernel, without copying them (splice(2)). One thread at a time.</summary>
internal sealed class SplicePipe : IDisposable
{
    private const int CapacityBytes = 1 << 20;

    private OwnedFd _read, _write;

    internal SplicePipe() => (_read, _write) = Open();

    /// <summary>Moves bytes; blocks. A shutdown of either socket ends it.</summary>
    /// <param name="from">A stream socket in blocking mode.</param>
    /// <param name="to">Another.</param>
    /// <param name="count">How many.</param>
    /// <returns>How it ended.</returns>
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

    /// <summary>What is left in the pipe belongs to nobody.</summary>
    private void Reset()
    {
        Dispose();
        (_read, _write) = Open();
    }

    private static (OwnedFd Read, OwnedFd Write) Open()
    {
        (OwnedFd Read, OwnedFd Write) pipe = Posix.Pipe();
        // A smaller pipe works too, with more calls; an unprivileged user may be refused.
        Posix.SetPipeSize(pipe.Write, CapacityBytes);
        return pipe;
    }
}
