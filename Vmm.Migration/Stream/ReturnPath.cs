using System.Buffers.Binary;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Core.Wire;
using Vmm.Migration.Status;

namespace Vmm.Migration.Stream;

/// <summary>The destination's end of the return path. A message is u16 type, u16 length, payload (stream 6.2). Thread-safe.</summary>
internal sealed class ReturnPathWriter(IMigrationChannel channel)
{
    private readonly Lock _gate = new();

    internal void SendSwitchoverAck() => Send(ReturnPathMessage.SwitchoverAck, []);

    /// <summary>Answers a PING. A source that says a final word is told first that this destination waits for it.</summary>
    internal void SendPong(uint value)
    {
        if (value == FinalWord.Offer) SendUInt32(ReturnPathMessage.Pong, FinalWord.Accept);
        SendUInt32(ReturnPathMessage.Pong, value);
    }

    /// <summary>Sends the last message. After a failure the error record follows it, where a QEMU source no longer reads.</summary>
    internal void SendShut(MigrationError? error)
    {
        SendUInt32(ReturnPathMessage.Shut, error is null ? 0u : 1u);
        if (error is not null) Send(ReturnPathMessage.VmmErrorRecord, MigrationErrors.ToWire(error, WireLimits.ReturnPathPayloadBytes));
    }

    private void SendUInt32(ReturnPathMessage type, uint value)
    {
        Span<byte> payload = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32BigEndian(payload, value);
        Send(type, payload);
    }

    private void Send(ReturnPathMessage type, ReadOnlySpan<byte> payload)
    {
        Span<byte> message = stackalloc byte[4 + WireLimits.ReturnPathPayloadBytes];
        BinaryPrimitives.WriteUInt16BigEndian(message, (ushort)type);
        BinaryPrimitives.WriteUInt16BigEndian(message[2..], (ushort)payload.Length);
        payload.CopyTo(message[4..]);
        lock (_gate) channel.Write(message[..(4 + payload.Length)]);
    }
}

/// <summary>How the return path ended.</summary>
internal enum ReturnPathEnd
{
    /// <summary>Not yet.</summary>
    Open,
    /// <summary>SHUT(0).</summary>
    Confirmed,
    /// <summary>SHUT with an error.</summary>
    Refused,
    /// <summary>The destination ended the connection between two messages.</summary>
    Closed,
    /// <summary>The connection broke, or a message made no sense.</summary>
    Lost,
}

/// <summary>
/// The source's end of the return path: a thread of its own reads messages, and other threads wait for them. The first failure goes into the latch, with the
/// destination's error record if one came.
/// </summary>
internal sealed class ReturnPathReader
{
    private readonly IMigrationChannel _channel;
    private readonly FaultLatch _latch;
    private readonly object _gate = new();
    private uint _lastPong;
    private bool _hasAnswered;
    private bool _peerWaits, _hasClosed;
    private int _switchoverAcks;
    private ReturnPathEnd _end;
    private Exception? _failure;

    /// <param name="channel">The main channel.</param>
    /// <param name="latch">Takes a failure.</param>
    internal ReturnPathReader(IMigrationChannel channel, FaultLatch latch)
    {
        _channel = channel;
        _latch = latch;
    }

    /// <summary>Completes when the reading thread has ended; never faults.</summary>
    internal Task Completion { get; private set; } = Task.CompletedTask;

    /// <summary>True once the thread has been started.</summary>
    internal bool IsStarted => Completion != Task.CompletedTask;

    /// <summary>Why the path ended without confirmation, or null.</summary>
    internal Exception? Failure
    {
        get { lock (_gate) return _failure; }
    }

    /// <summary>Starts the thread; the channel must be open in both directions.</summary>
    /// <param name="isUrgent">True for an update, whose guest is stopped until the confirmation has been read: the thread gets realtime priority.</param>
    internal void Start(bool isUrgent = false) =>
        Completion = WorkerThread.Run("mig/src/rp", () => RealtimeBoost.During(isUrgent, Run));

    /// <summary>Number of SWITCHOVER_ACK messages so far.</summary>
    internal int SwitchoverAcks => Volatile.Read(ref _switchoverAcks);

    /// <summary>True once the destination has answered this source's first PINGs: somebody reads the stream there.</summary>
    internal bool HasAnswered
    {
        get { lock (_gate) return _hasAnswered; }
    }

    /// <summary>True when the destination waits for this source's final word (<see cref="FinalWord"/>).</summary>
    internal bool PeerWaitsForFinalWord
    {
        get { lock (_gate) return _peerWaits; }
    }

    /// <summary>The value of the last PONG to a numbered PING.</summary>
    internal uint LastPong
    {
        get { lock (_gate) return _lastPong; }
    }

    /// <summary>Waits until <see cref="HasAnswered"/>.</summary>
    /// <returns>False after the timeout, or when the path has failed and the latch has the reason.</returns>
    /// <exception cref="StreamFormatException">The destination confirmed what it has not been sent yet.</exception>
    internal bool WaitAnswered(TimeSpan timeout)
    {
        if (Wait(() => _hasAnswered, timeout)) return true;
        lock (_gate)
            if (_end == ReturnPathEnd.Confirmed) throw new StreamFormatException("return path: SHUT(0) before the end of the stream");
        return false;
    }

    /// <summary>Waits for a PONG of this value or a later one.</summary>
    /// <returns>False after the timeout or when the path has ended.</returns>
    internal bool WaitPong(uint value, TimeSpan timeout) => Wait(() => _lastPong >= value, timeout);

    /// <summary>Waits for the end of the return path.</summary>
    /// <returns>How it ended; <see cref="ReturnPathEnd.Open"/> after the timeout.</returns>
    internal ReturnPathEnd WaitEnd(TimeSpan timeout)
    {
        Wait(() => _end != ReturnPathEnd.Open, timeout);
        lock (_gate) return _end;
    }

    private bool Wait(Func<bool> condition, TimeSpan timeout)
    {
        long deadline = timeout == Timeout.InfiniteTimeSpan ? long.MaxValue : Environment.TickCount64 + (long)timeout.TotalMilliseconds;
        lock (_gate)
        {
            while (!condition())
            {
                if (_end != ReturnPathEnd.Open) return false;
                long left = deadline == long.MaxValue ? 1000 : deadline - Environment.TickCount64;
                if (left <= 0) return false;
                Monitor.Wait(_gate, (int)Math.Min(left, 1000));
            }
            return true;
        }
    }

    private void Run()
    {
        try
        {
            ReadMessages();
        }
#pragma warning disable CA1031 // The latch keeps it as the migration's reason.
        catch (Exception e)
#pragma warning restore CA1031
        {
            // Stored before the waiting threads wake, because they look for the reason in the latch.
            _latch.Set(e);
            End(e is RemoteMigrationException or MigrationFailedException ? ReturnPathEnd.Refused : _hasClosed ? ReturnPathEnd.Closed : ReturnPathEnd.Lost, _latch.Reason);
        }
    }

    private void ReadMessages()
    {
        Span<byte> header = stackalloc byte[4];
        Span<byte> payload = stackalloc byte[WireLimits.ReturnPathPayloadBytes];
        while (true)
        {
            _hasClosed = !Fill(header, atStart: true);
            if (_hasClosed) throw new ChannelException($"{_channel.Name}: the destination closed the connection without confirming the migration", Errno.ECONNRESET);
            var type = (ReturnPathMessage)BinaryPrimitives.ReadUInt16BigEndian(header);
            int length = BinaryPrimitives.ReadUInt16BigEndian(header[2..]);
            if (length > payload.Length) throw new StreamLimitException($"return path: message {(ushort)type} of {length} bytes is over {payload.Length} (WireLimits.ReturnPathPayloadBytes)");
            Fill(payload[..length], atStart: false);
            switch (type)
            {
                case ReturnPathMessage.Shut when length == 4:
                    uint value = BinaryPrimitives.ReadUInt32BigEndian(payload);
                    if (value == 0) { End(ReturnPathEnd.Confirmed, null); return; }
                    throw ReadErrorRecord(header, payload, value);
                case ReturnPathMessage.Pong when length == 4:
                    OnPong(BinaryPrimitives.ReadUInt32BigEndian(payload));
                    break;
                case ReturnPathMessage.SwitchoverAck when length == 0:
                    Interlocked.Increment(ref _switchoverAcks); // Nobody waits for one without the capability, and a surplus one does no harm (stream 6.3).
                    break;
                default:
                    throw new StreamFormatException($"return path: expected SHUT or PONG of 4 bytes or SWITCHOVER_ACK of 0, found message type {(ushort)type} of {length} bytes")
                    {
                        Section = "return path", Found = $"type {(ushort)type} of {length} bytes",
                    };
            }
        }
    }

    private void OnPong(uint value)
    {
        lock (_gate)
        {
            if (value == FinalWord.Accept) _peerWaits = true;
            else if (value == FinalWord.Offer) _hasAnswered = true;
            else _lastPong = Math.Max(_lastPong, value);
            Monitor.PulseAll(_gate);
        }
    }

    /// <summary>Reads the error record that a vmm destination sends after SHUT with an error; a QEMU destination just closes.</summary>
    private Exception ReadErrorRecord(Span<byte> header, Span<byte> payload, uint value)
    {
        try
        {
            if (Fill(header, atStart: true)
                && BinaryPrimitives.ReadUInt16BigEndian(header) == (ushort)ReturnPathMessage.VmmErrorRecord
                && BinaryPrimitives.ReadUInt16BigEndian(header[2..]) is var length && length <= payload.Length)
            {
                Fill(payload[..length], atStart: false);
                if (MigrationErrors.FromWire(payload[..length]) is { } error) return new RemoteMigrationException(error);
            }
        }
        catch (VmmException)
        {
            // No record came, so only the value is known.
        }
        return new MigrationFailedException($"the destination reported error {value}; its log has the cause");
    }

    private bool Fill(Span<byte> into, bool atStart)
    {
        bool first = atStart;
        while (into.Length > 0)
        {
            int n = _channel.Read(into);
            if (n == 0 && first) return false;
            if (n == 0) throw new StreamTruncatedException("return path: the connection ended inside a message");
            first = false;
            into = into[n..];
        }
        return true;
    }

    private void End(ReturnPathEnd end, Exception? failure)
    {
        lock (_gate)
        {
            _end = end;
            _failure = failure;
            Monitor.PulseAll(_gate);
        }
    }
}
