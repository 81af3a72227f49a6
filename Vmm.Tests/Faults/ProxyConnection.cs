using System.Buffers.Binary;
using System.Net.Sockets;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;

namespace Vmm.Tests.Faults;

/// <summary>One connection through a proxy: two sockets, and a pump for each direction. The pump that ends last closes both.</summary>
internal sealed class ProxyConnection : IDisposable
{
    private const uint MultifdMagic = 0x11223344;

    private readonly Socket _client, _server;
    private readonly Pump _forward, _back;
    private readonly bool _isUnix;
    private int _running = 2;
    private volatile bool _reset, _closed;
    private volatile FaultSession _session;
    private Role? _role;

    internal ProxyConnection(Socket client, Socket server, FaultSession session, Role? role)
    {
        (_client, _server, _session, _role) = (client, server, session, role);
        _isUnix = client.AddressFamily == AddressFamily.Unix;
        foreach (Socket one in (Socket[])[client, server])
        {
            one.Blocking = false;
            if (one.ProtocolType == ProtocolType.Tcp) one.NoDelay = true;
        }
        _forward = new Pump(this, client, server, Direction.Forward);
        _back = new Pump(this, server, client, Direction.Back);
        session.Add(this);
    }

    /// <summary>Null until the first bytes of a migration's connection have come.</summary>
    internal Role? Role => _role;

    internal bool IsClosed => _closed;

    /// <summary>Bytes that were sent on.</summary>
    internal long Sent(Direction direction) => (direction == Direction.Forward ? _forward : _back).Sent;

    internal void Start()
    {
        if (_session.Lasting is { } lasting) Suffer(lasting);
        _forward.Start();
        _back.Start();
    }

    /// <summary>Counts from now on for another attempt.</summary>
    internal void Arm(FaultSession session, Role role)
    {
        _role = role;
        _forward.Zero();
        _back.Zero();
        _session = session;
        session.Add(this);
    }

    internal void Suffer(Fault fault)
    {
        Pump hit = fault.Direction == Direction.Forward ? _forward : _back;
        switch (fault.Action)
        {
            case FaultAction.Reset:
                End(reset: true);
                break;
            case FaultAction.Close:
                End(reset: false);
                break;
            case FaultAction.HalfClose:
                hit.HalfClose();
                break;
            case FaultAction.Stall:
                hit.Mode = PumpMode.Stall;
                break;
            case FaultAction.Lose:
                hit.Mode = PumpMode.Lose;
                break;
            case FaultAction.StallBoth or FaultAction.LoseBoth:
                _forward.Mode = _back.Mode = fault.Action == FaultAction.StallBoth ? PumpMode.Stall : PumpMode.Lose;
                break;
            case FaultAction.Trickle:
                hit.Trickle(fault.Bytes);
                break;
        }
    }

    internal void Resume()
    {
        foreach (Pump one in (Pump[])[_forward, _back])
            if (one.Mode == PumpMode.Stall) one.Mode = PumpMode.Pass;
    }

    public void Dispose() => End(reset: false);

    private void End(bool reset)
    {
        _reset |= reset;
        _forward.Mode = _back.Mode = PumpMode.Ended;
    }

    private void PumpEnded(bool broken)
    {
        if (broken) _reset |= true;
        if (Interlocked.Decrement(ref _running) > 0) return;
        foreach (Socket one in (Socket[])[_client, _server])
        {
            if (_reset && !_isUnix) one.LingerState = new LingerOption(true, 0);
            one.Dispose();
        }
        _closed = true;
        _forward.Dispose();
        _back.Dispose();
    }

    private enum PumpEnd
    {
        Done,
        ReadFailed,
        WriteFailed,
    }

    private enum PumpMode
    {
        Pass,
        Stall,
        Lose,
        Ended,
    }

    /// <summary>Carries one direction, on a thread of its own.</summary>
    private sealed class Pump(ProxyConnection owner, Socket from, Socket to, Direction direction) : IDisposable
    {
        private const int ChunkBytes = 64 << 10;
        private readonly OwnedFd _from = new((int)from.SafeHandle.DangerousGetHandle(), ownsFd: false), _to = new((int)to.SafeHandle.DangerousGetHandle(), ownsFd: false);
        private readonly OwnedFd _wake = Posix.EventFd();
        private readonly Lock _gate = new();
        private readonly List<OwnedFd> _fds = [];
        private PumpMode _mode;
        private int _trickle;
        private long _sent;
        private bool _done;

        internal long Sent => Interlocked.Read(ref _sent);

        internal PumpMode Mode
        {
            get { lock (_gate) return _mode; }
            set
            {
                lock (_gate)
                {
                    if (_done || _mode == PumpMode.Ended) return;
                    _mode = value;
                    Posix.SignalEventFd(_wake);
                }
            }
        }

        internal void Zero() => Interlocked.Exchange(ref _sent, 0);

        internal void Trickle(int bytes) => Volatile.Write(ref _trickle, bytes);

        internal void HalfClose()
        {
            Posix.ShutdownSocket(_to, Posix.SHUT_WR);
            Mode = PumpMode.Lose;
        }

        internal void Start() => WorkerThread.Run($"proxy/{direction}", Run);

        public void Dispose()
        {
            lock (_gate)
            {
                _done = true;
                _wake.Dispose();
            }
            _fds.ForEach(static f => f.Dispose());
        }

        private void Run()
        {
            PumpEnd end = PumpEnd.ReadFailed;
            try
            {
                end = Carry();
            }
            finally
            {
                // When the server takes nothing more, the way back may still bring its last word.
                if (end == PumpEnd.ReadFailed || (end == PumpEnd.WriteFailed && direction == Direction.Back)) owner.End(reset: true);
                owner.PumpEnded(end == PumpEnd.WriteFailed);
            }
        }

        private PumpEnd Carry()
        {
            byte[] buffer = new byte[StreamMarks.Overlap + ChunkBytes];
            int overlap = 0;
            if (owner._role is not null) FireIfThere();
            while (true)
            {
                if (!WaitToPass(_from, Posix.POLLIN, reading: true)) return PumpEnd.Done;
                int n = owner._isUnix
                    ? Posix.ReceiveWithFds(_from, buffer.AsSpan(StreamMarks.Overlap), _fds, wait: false, out Errno errno)
                    : Posix.Receive(_from, buffer.AsSpan(StreamMarks.Overlap), Posix.MSG_DONTWAIT, out errno);
                if (n < 0 && errno == Errno.EAGAIN) continue;
                if (n < 0) return PumpEnd.ReadFailed;
                if (n == 0)
                {
                    if (Mode != PumpMode.Lose) Posix.ShutdownSocket(_to, Posix.SHUT_WR);
                    return PumpEnd.Done;
                }
                if (direction == Direction.Forward && owner._role is null)
                {
                    owner._role = RoleOf(buffer.AsSpan(StreamMarks.Overlap, n));
                    FireIfThere();
                }
                if (owner._role == Faults.Role.Main) Look(buffer.AsSpan(StreamMarks.Overlap - overlap, overlap + n), overlap);
                if (!Send(buffer.AsSpan(StreamMarks.Overlap, n))) return Mode == PumpMode.Ended ? PumpEnd.Done : PumpEnd.WriteFailed;
                overlap = Math.Min(StreamMarks.Overlap, n + overlap);
                buffer.AsSpan(StreamMarks.Overlap + n - overlap, overlap).CopyTo(buffer.AsSpan(StreamMarks.Overlap - overlap));
            }
        }

        private void Look(ReadOnlySpan<byte> withOverlap, int overlap)
        {
            StreamMarks marks = owner._session.Marks;
            if (direction == Direction.Forward) marks.LookForward(withOverlap, Sent - overlap);
            else marks.LookBack(withOverlap[overlap..]);
        }

        private Role RoleOf(ReadOnlySpan<byte> first) =>
            first.Length >= 4 && BinaryPrimitives.ReadUInt32BigEndian(first) == MultifdMagic ? owner._session.NextData() : Faults.Role.Main;

        /// <summary>Lets the fault happen if this direction has come to its place.</summary>
        private void FireIfThere()
        {
            if (owner._role is { } role && owner._session.Place(role, direction) is { } place && Sent >= place) owner._session.Fire();
        }

        /// <summary>Sends bytes on, up to the fault's place, then what the fault leaves of them.</summary>
        private bool Send(ReadOnlySpan<byte> bytes)
        {
            while (bytes.Length > 0)
            {
                if (!WaitToPass(_to, Posix.POLLOUT, reading: false)) return false;
                if (Mode == PumpMode.Lose)
                {
                    Interlocked.Add(ref _sent, bytes.Length);
                    DropDescriptors();
                    return true;
                }
                int most = bytes.Length;
                if (owner._role is { } role && owner._session.Place(role, direction) is { } place) most = (int)Math.Clamp(place - Sent, 0, most);
                if (most > 0 && Volatile.Read(ref _trickle) > 0)
                {
                    most = 1;
                    Interlocked.Decrement(ref _trickle);
                }
                if (most > 0)
                {
                    int n = Posix.SendWithFds(_to, bytes[..most], [.. _fds], out Errno errno);
                    if (n < 0 && errno == Errno.EAGAIN) continue;
                    if (n < 0) return false;
                    DropDescriptors();
                    Interlocked.Add(ref _sent, n);
                    bytes = bytes[n..];
                }
                FireIfThere();
            }
            return true;
        }

        private void DropDescriptors()
        {
            _fds.ForEach(static f => f.Dispose());
            _fds.Clear();
        }

        /// <summary>Waits until a socket is ready and this direction flows; false when the connection ends.</summary>
        private bool WaitToPass(OwnedFd socket, short events, bool reading)
        {
            while (true)
            {
                PumpMode mode = Mode;
                if (mode == PumpMode.Ended) return false;
                if (mode == PumpMode.Lose && !reading) return true;
                // A stalled direction notices nothing, not even the end of its sockets.
                if (mode == PumpMode.Stall) Posix.Poll(_wake, Posix.POLLIN, null, -1, out _);
                else if (Posix.Poll(socket, events, _wake, -1, out bool woken) != 0 && !woken) return true;
                Posix.DrainEventFd(_wake);
            }
        }
    }
}
