using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>
/// Moves migration data from one socket to another without passing through this process's memory. An addition to
/// <see cref="IVfioMigrationData"/>, which always works; one thread at a time uses either.
/// </summary>
internal interface IVfioDirectData
{
    /// <summary>Whether the methods may be used; not when the peer needs each message in one piece.</summary>
    bool CanMove { get; }

    /// <summary>Most bytes of one piece.</summary>
    int PieceBytes { get; }

    /// <summary>Moves all that is left to read in STOP_COPY.</summary>
    /// <param name="destination">A socket in blocking mode.</param>
    /// <param name="name">Its name, for errors.</param>
    /// <param name="announce">Called before each piece with its length; may write to the destination, ahead of the piece. May run on another thread while this call waits.</param>
    /// <returns>The device's answer.</returns>
    /// <exception cref="ChannelException">The destination failed; the device and its session are as usable as before.</exception>
    Errno MoveOut(OwnedFd destination, string name, Action<int> announce);

    /// <summary>Moves one piece in. Its answer may come with a later call or with <see cref="FinishMoves"/>.</summary>
    /// <param name="buffered">First bytes of the piece, which have been read already.</param>
    /// <param name="source">A socket in blocking mode that has the rest.</param>
    /// <param name="name">Its name, for errors.</param>
    /// <param name="count">Bytes of the piece, those buffered included.</param>
    /// <returns>The device's answer to an earlier piece, or none.</returns>
    /// <exception cref="ChannelException">The source failed; the device got zeros in place of the missing bytes, so its session is void.</exception>
    Errno MoveIn(ReadOnlySpan<byte> buffered, OwnedFd source, string name, int count);

    /// <summary>Waits for the answers that are still to come.</summary>
    /// <returns>The first refusal, or none.</returns>
    Errno FinishMoves();
}
