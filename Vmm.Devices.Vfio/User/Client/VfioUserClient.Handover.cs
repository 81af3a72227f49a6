using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>A connection that changes process. Only the process that has it receives or sends on it (vfio-migration 7.4).</summary>
internal sealed partial class VfioUserClient
{
    private readonly OwnedFd _pause = Posix.EventFd();
    private VfioUserTranscript? _recording;
    private byte[] _version = [];
    // While set, answers come from here and the server is not asked. Guarded by _gate for writes.
    private volatile VfioUserTranscript? _replay;
    private volatile bool _pausing;
    private VfioUserExchange? _last; // Its reply ends receiving. Guarded by _gate.
    private volatile bool _suspended;
    private bool _handedOver;

    // Receivers are started early and wait for their turn: a thread started while the guest is stopped would first wait for a processor.
    private readonly ManualResetEvent _turn = new(false);
    private readonly List<int> _waiting = []; // Their thread ids. Guarded by _gate.
    private volatile List<IDisposable>? _raised;

    /// <summary>Takes over a connection that another process negotiated and still has; sends and receives nothing until <see cref="Resume"/>.</summary>
    /// <param name="handover">The connection; owned.</param>
    /// <param name="name">For errors: the socket's path.</param>
    /// <param name="dma">Serves the server's DMA commands.</param>
    /// <param name="timeoutMs">Limit of a request.</param>
    /// <exception cref="VfioUserProtocolException">The transcript's version cannot be read.</exception>
    internal VfioUserClient(VfioUserHandover handover, string name, IVfioUserDma dma, int timeoutMs)
    {
        Name = name;
        TimeoutMs = timeoutMs;
        _dma = dma;
        _socket = new VfioUserSocket(handover.Socket, name);
        if (handover.Twin is not null) _twin = new VfioUserSocket(handover.Twin, name);
        _recording = _replay = handover.Transcript;
        _version = handover.Transcript.Version;
        _watchdog = new Timer(static self => ((VfioUserClient)self!).CheckSenders(), this, timeoutMs, Math.Max(10, timeoutMs / 4));
        try
        {
            Server = VfioUserVersion.Parse(_version);
            StartReceivers(waiting: true);
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <summary>Transcript that records the requests while the device is opened; null afterwards, and while answers come from a transcript.</summary>
    internal VfioUserTranscript? Recorder => IsRecording && _replay is null ? _recording : null;

    /// <summary>Record the server's answers while the device is opened, until <see cref="EndRecording"/>.</summary>
    internal bool IsRecording { get; set; }

    /// <summary>Whether a receiver should end at the next boundary of messages.</summary>
    internal bool IsPausing => _pausing;

    /// <summary>True when no request waits for a reply.</summary>
    internal bool IsIdle
    {
        get { lock (_gate) return _pending.Count == 0; }
    }

    /// <summary>Ends the twin receiver's wait for messages, so that it stops reading the connection.</summary>
    internal OwnedFd PauseSignal => _pause;

    /// <summary>Ends the recording, when the device is open.</summary>
    /// <returns>What the next process needs; the descriptors stay this object's.</returns>
    internal VfioUserHandover EndRecording()
    {
        IsRecording = false;
        return new VfioUserHandover(_socket.Descriptor, _twin?.Descriptor, _recording!);
    }

    /// <summary>
    /// Stops receiving between two messages, so that the next process can continue: what the server sends from now on waits in the socket.
    /// No request may be under way. Idempotent.
    /// </summary>
    /// <exception cref="VfioException">The connection failed meanwhile.</exception>
    internal void Suspend()
    {
        if (_suspended || _replay is not null || Fault is not null) return;
        // The receiver blocks in the kernel until a message comes, so a request that changes nothing makes the server send one. Before its reply,
        // the server may still do DMA, on either socket, and wait for the answer.
        using (VfioUserExchange x = Begin())
        {
            lock (_gate) _last = x;
            new VfioUserDeviceInfo(VfioUserDeviceInfo.Length, 0, 0, 0).Write(x.Body(VfioUserDeviceInfo.Length));
            x.Run(VfioUserCommand.DeviceGetInfo);
        }
        Posix.SignalEventFd(_pause);
        foreach (Task receiver in _receivers) receiver.GetAwaiter().GetResult();
        _receivers.Clear();
        if (Fault is { } fault) throw new VfioException($"vfio-user '{Name}': the server was lost before another process could have it", fault.Errno, fault);
        _suspended = true;
    }

    /// <summary>Receives and sends requests to the server again, because this process has the connection now.</summary>
    internal void Resume()
    {
        if (!_suspended && _replay is null) return;
        lock (_gate)
        {
            _replay = null;
            _suspended = _pausing = false;
            if (_fault is not null) return;
        }
        Posix.DrainEventFd(_pause);
        if (_receivers.Count > 0) GiveTurn();
        else StartReceivers();
    }

    /// <summary>Ends the receivers' higher priority, after the first message has come.</summary>
    internal void LowerReceivers()
    {
        if (_raised is null || Interlocked.Exchange(ref _raised, null) is not { } raised) return;
        foreach (IDisposable boost in raised) boost.Dispose();
    }

    private void StartReceivers(bool waiting = false)
    {
        StartReceiver(_socket, "vfio-user", isWaiting: waiting);
        if (_twin is not null) StartReceiver(_twin, "vfio-user/dma", isTwin: true, isWaiting: waiting);
    }

    /// <summary>Lets the receivers run, with a higher priority until the first message, because the guest cannot start before its device answers.</summary>
    private void GiveTurn()
    {
        lock (_gate) _raised = [.. _waiting.Select(WorkerThread.Raise).OfType<IDisposable>()];
        _turn.Set();
    }

    /// <summary>Waits, on a receiver's thread, until this process has the connection; false when the client was disposed first.</summary>
    private bool WaitTurn()
    {
        lock (_gate) _waiting.Add(Posix.ThreadId);
        _turn.WaitOne();
        return !_disposed;
    }

    /// <summary>Called when another process finally has the connection: closing it here must not end it there.</summary>
    internal void HandOver() => _handedOver = true;

    private bool IsElsewhere => _handedOver || _replay is not null;
}
