using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>Moves migration data from socket to socket, and sends each request one ahead, so that the server works while a piece is moved.</summary>
internal sealed partial class VfioUserMigrationData
{
    private SplicePipe? _pipe;
    private VfioUserExchange? _unanswered;

    /// <inheritdoc/>
    /// <remarks>Only with a chunk that is larger than the safe one, which is set for this project's own server: a moved message leaves in several pieces, which other servers may take for a short message (vfio-user 1.1).</remarks>
    public bool CanMove => _chunkBytes > VfioUserLimits.SafeDataBytes;

    /// <inheritdoc/>
    public int PieceBytes => _chunkBytes;

    /// <inheritdoc/>
    public Errno MoveOut(OwnedFd destination, string name, Action<int> announce)
    {
        if (!MayRun(!resuming, 1, out Errno errno)) return errno;
        using var sink = new Outlet(_chunkBytes, destination, name, announce);
        using VfioUserExchange first = client.Begin(), second = client.Begin();
        (VfioUserExchange now, VfioUserExchange next) = (first, second);
        errno = Ask(now, sink);
        while (errno == Errno.None)
        {
            errno = Ask(next, sink);
            Errno answer = now.Wait(client.TimeoutMs);
            if (answer != Errno.None || sink.IsDone)
            {
                // The request that was sent ahead gets its reply too: no data, or the same refusal.
                Errno last = errno == Errno.None ? next.Wait(client.TimeoutMs) : errno;
                errno = answer != Errno.None ? answer : last;
                break;
            }
            (now, next) = (next, now);
        }
        if (sink.Failure is { } failure) throw failure;
        return errno;
    }

    /// <inheritdoc/>
    public Errno MoveIn(ReadOnlySpan<byte> buffered, OwnedFd source, string name, int count)
    {
        if (!MayRun(resuming, count, out Errno errno)) return errno;
        _pipe ??= new SplicePipe();
        VfioUserExchange x = client.Begin();
        new VfioUserMigData((uint)(VfioUserMigData.Length + count), (uint)count).Write(x.Body(VfioUserMigData.Length));
        errno = x.SendMoving(VfioUserCommand.MigDataWrite, buffered, _pipe, source, count - buffered.Length, out Errno broken);
        Errno earlier = FinishMoves();
        if (errno == Errno.None) _unanswered = x;
        else x.Dispose();
        if (broken != Errno.None)
        {
            FinishMoves();
            throw Posix.Error($"cannot read from {name}", broken);
        }
        return earlier != Errno.None ? earlier : errno;
    }

    /// <inheritdoc/>
    public Errno FinishMoves()
    {
        if (_unanswered is not { } x) return Errno.None;
        _unanswered = null;
        using (x) return x.Wait(client.TimeoutMs);
    }

    private Errno Ask(VfioUserExchange x, Outlet sink)
    {
        new VfioUserMigData((uint)(VfioUserMigData.Length + _chunkBytes), (uint)_chunkBytes).Write(x.Body(VfioUserMigData.Length));
        x.BodySink = sink.Take;
        return x.Send(VfioUserCommand.MigDataRead, VfioUserMigData.Length + _chunkBytes);
    }

    private void EndMoves()
    {
        _unanswered?.Dispose();
        (_unanswered, SplicePipe? pipe) = (null, _pipe);
        _pipe = null;
        pipe?.Dispose();
    }

    /// <summary>Moves the bodies of replies to the destination, on the receiver's thread.</summary>
    private sealed class Outlet(int asked, OwnedFd destination, string name, Action<int> announce) : IDisposable
    {
        private readonly SplicePipe _pipe = new();
        private volatile bool _isDone;
        private volatile VmmException? _failure;

        /// <summary>The end was seen, or the destination failed.</summary>
        internal bool IsDone => _isDone;

        internal VmmException? Failure => _failure;

        /// <summary>Consumes the rest of one reply. An exception ends the connection.</summary>
        internal void Take(VfioUserSocket socket, ReadOnlySpan<byte> headBytes, int rest)
        {
            if (!VfioUserMigData.TryRead(headBytes, out VfioUserMigData head) || head.Size > asked || head.Size > rest)
                throw new VfioUserProtocolException($"vfio-user '{socket.Name}': {head.Size} bytes of migration data in a reply with room for {rest}, {asked} were asked for");
            int size = (int)head.Size;
            if (size == 0) _isDone = true;
            if (!_isDone && TryAnnounce(size))
            {
                SpliceResult moved = socket.MoveBody(_pipe, destination, size);
                if (moved.FailedSide == SpliceSide.From) throw Posix.Error($"vfio-user '{socket.Name}': receive", moved.Errno);
                if (moved.FailedSide == SpliceSide.To) Fail(Posix.Error($"cannot write to {name}", moved.Errno));
                rest -= moved.TakenBytes;
            }
            socket.SkipBody(rest);
        }

        public void Dispose() => _pipe.Dispose();

        private bool TryAnnounce(int size)
        {
            try
            {
                announce(size);
                return true;
            }
            catch (VmmException e)
            {
                Fail(e);
                return false;
            }
        }

        private void Fail(VmmException reason) => (_failure, _isDone) = (reason, true);
    }
}
