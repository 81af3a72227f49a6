using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>A connection that changes process: who has it receives, and nobody else touches it (vfio-migration 7.4).</summary>
internal sealed partial class VfioUserClient
{
    private readonly OwnedFd _pause = Posix.EventFd();
    private VfioUserTranscript? _recording;
    private byte[] _version = [];
    // Set: answers come from here, the server is not to be asked. Guarded by _gate for writes.
    private volatile VfioUserTranscript? _replay;
    private volatile bool _pausing;
    private VfioUserExchange? _last; // Its reply ends receiving. Guarded by _gate.
    private volatile bool _suspended;
    private bool _handedOver;

    // Receivers that exist before their turn: one that is started while the guest stands still first stands in line for a processor.
    private readonly ManualResetEvent _turn = new(false);
    private readonly List<int> _waiting = []; // Their thread ids. Guarded by _gate.
    private volatile List<IDisposable>? _raised;

    /// <summary>Takes over a connection that another process negotiated and still has; silent until <see cref="Resume"/>.</summary>
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

    /// <summary>Where requests of an opening device are noted; null once it is open, or when their answers come from a transcript.</summary>
    internal VfioUserTranscript? Recorder => IsRecording && _replay is null ? _recording : null;

    /// <summary>Note what the server answers from here on, while the device is opened; ends with <see cref="EndRecording"/>.</summary>
    internal bool IsRecording { get; set; }

    /// <summary>Whether a receiver should end at the next boundary of messages.</summary>
    internal bool IsPausing => _pausing;

    /// <summary>Nobody waits for a reply.</summary>
    internal bool IsIdle
    {
        get { lock (_gate) return _pending.Count == 0; }
    }

    /// <summary>Ends a twin's wait for messages when the connection is to be left alone.</summary>
    internal OwnedFd PauseSignal => _pause;

    /// <summary>The device is open.</summary>
    /// <returns>What the next process needs; the connection stays this object's.</returns>
    internal VfioUserHandover EndRecording()
    {
        IsRecording = false;
        return new VfioUserHandover(_socket.Descriptor, _twin?.Descriptor, _recording!);
    }

    /// <summary>
    /// Stops receiving between two messages, so that the next process can go on there: what the server sends from here on waits in the socket.
    /// No request may be under way. Idempotent.
    /// </summary>
    /// <exception cref="VfioException">The connection broke over it.</exception>
    internal void Suspend()
    {
        if (_suspended || _replay is not null || Fault is not null) return;
        // A receiver sits in the kernel until something comes. A question that changes nothing makes the server send something; until it has
        // answered, it may do DMA first and wait for that, on either socket.
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

    /// <summary>This process has the connection: receives, and asks the server from here on.</summary>
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

    /// <summary>After a message: whoever waited for the receivers has had them.</summary>
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

    /// <summary>Ahead of ordinary threads until a message has come: the guest starts when its device has answered.</summary>
    private void GiveTurn()
    {
        lock (_gate) _raised = [.. _waiting.Select(WorkerThread.Raise).OfType<IDisposable>()];
        _turn.Set();
    }

    /// <summary>A receiver's wait for the connection to be this process's; false when it never becomes that.</summary>
    private bool WaitTurn()
    {
        lock (_gate) _waiting.Add(Posix.ThreadId);
        _turn.WaitOne();
        return !_disposed;
    }

    /// <summary>Another process has the connection for good: closing it here must not end it there.</summary>
    internal void HandOver() => _handedOver = true;

    private bool IsElsewhere => _handedOver || _replay is not null;
}
