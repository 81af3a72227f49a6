using Microsoft.Extensions.Logging;
using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Migration.Attempts;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.Diagnostics;
using Vmm.Migration.Incoming;
using Vmm.Migration.Multifd;
using Vmm.Migration.Outgoing;
using Vmm.Migration.Parameters;
using Vmm.Migration.Ram;
using Vmm.Migration.Rehearsals;
using Vmm.Migration.Status;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Engine;

/// <summary>The engine of one VM: at most one migration at a time. Dispose cancels a running migration and waits for its end.</summary>
internal sealed class MigrationEngine : IMigrationEngine, IAttempts, IDisposable
{
    private static readonly TimeSpan s_tailLimit = TimeSpan.FromSeconds(1);

    private readonly MigrationContext _context;
    private readonly MigrationParameterSet _parameters = new();
    private readonly MigrationCapabilitySet _capabilities = new();
    private readonly Lock _gate = new();
    private volatile OutgoingMigration? _outgoing;
    private volatile IncomingMigration? _incoming;
    private MigrationListener? _listener;
    private Task<MigrationStatus>? _running;
    private IDisposable? _frozen;
    private IncomingRecord _incomingRecord = new();
    private volatile bool _isIncoming;
    private bool _exclusive;
    private volatile bool _keepsListening;
    private volatile Exception? _incomingEnd;
    private volatile bool _isDisposed;

    /// <summary>The engine whose handlers of <see cref="StatusChanged"/> run on this thread.</summary>
    [ThreadStatic]
    private static MigrationEngine? t_notifying;

    public MigrationEngine(Vm vm, MigrationBlockers blockers, MigrationNotifiers notifiers, ILoggerFactory loggers)
    {
        _context = new MigrationContext(vm, blockers, notifiers, new MigrationStateMachine(), _parameters, _capabilities, loggers.CreateLogger("Vmm.Migration"))
        {
            Rehearsed = WorkerThread.Run("mig/rehearsal", Rehearsal.Run),
        };
        vm.Disposing += Dispose;
        vm.Events.Lost += OnDeviceLost;
        _context.Machine.Changed += status =>
        {
            MigrationLog.StatusChanged(_context.Logger, status.ToWireName());
            Notify(status);
        };
    }

    public event Action<MigrationStatus>? StatusChanged;

    public event Action<long>? PassCompleted;

    public MigrationStatus Status => _context.Machine.Status;

    public MigrationParameters Parameters
    {
        get => _parameters.Current;
        set => _parameters.Replace(value);
    }

    public MigrationCapabilities Capabilities => _capabilities.Current;

    public void SetCapabilities(IEnumerable<KeyValuePair<MigrationCapability, bool>> changes) => _capabilities.Apply(changes);

    public void SetParameters(IEnumerable<KeyValuePair<MigrationParameter, object>> changes) => _parameters.Apply(changes);

    /// <summary>Tells the handlers of <see cref="StatusChanged"/>. One that throws changes nothing about the migration.</summary>
    private void Notify(MigrationStatus status)
    {
        MigrationEngine? before = t_notifying;
        t_notifying = this;
        try
        {
            foreach (Delegate handler in StatusChanged?.GetInvocationList() ?? [])
            {
                try
                {
                    ((Action<MigrationStatus>)handler)(status);
                }
#pragma warning disable CA1031 // The migration goes on whatever a handler does; the log names it.
                catch (Exception e)
#pragma warning restore CA1031
                {
                    MigrationLog.HandlerFailed(_context.Logger, e.ToString());
                }
            }
        }
        finally
        {
            t_notifying = before;
        }
    }

    public Func<string, OwnedFd?>? TakeNamedFd { get; set; }

    public Func<long, int, OwnedFd?>? OpenFdSet { get; set; }

    public void Yank()
    {
        // No lock: it runs out-of-band, and a control call that holds the lock may be waiting.
        var reason = new ChannelException("the migration's channels were shut by yank", Errno.ECONNABORTED);
        if (!_isIncoming) _outgoing?.Abort(reason);
        _incoming?.Abort(reason);
    }

    /// <summary>Fails a migration that needs a device which is gone. No lock, as for <see cref="Yank"/>.</summary>
    private void OnDeviceLost(string id, VmmException reason)
    {
        var failure = new DeviceStateException($"device '{id}' is gone: {VmmException.Describe(reason)}", reason) { Hint = "a reset of the VM attaches it to a new server" };
        if (!_isIncoming) _outgoing?.LoseDevice(failure);
        else if (_context.Vm.RunState.State == RunState.InMigrate && !_context.Vm.CprFds.IsIncoming) _incoming?.LoseDevice(failure);
    }

    /// <summary>Variant of the framing for migrations that start from now on.</summary>
    public MigrationCompat Compat
    {
        get => _context.Compat;
        set => _context.Compat = value;
    }

    public MigrationContext Context => _context;

    public MigrationInfo Query()
    {
        lock (_gate)
        {
            MigrationStatus status = Status;
            MigrationInfo info = _isIncoming || _outgoing is null
                ? new MigrationInfo
                {
                    Status = status, IsIncoming = _isIncoming,
                    Error = _incomingRecord.Error,
                    Downtime = _incomingRecord.Downtime,
                    SocketAddresses = _listener is { } l && status != MigrationStatus.Completed ? l.Addresses : [],
                }
                : _outgoing.Progress.Info(status, Parameters);
            if (!info.IsIncoming && _context.Vm.DeviceTransfer is { IsUsed: true } transfer) info = info with { VfioTransferredBytes = transfer.Bytes };
            if (!info.IsIncoming && _context.Vm.CpuThrottle.Percent is > 0 and var percent) info = info with { CpuThrottlePercent = percent };
            return info with { BlockedReasons = _context.Blockers.Reasons(Parameters.Mode) };
        }
    }

    public Task<MigrationStatus> Migrate(MigrationAddress address, MigrationAddress? cpr = null)
    {
        ArgumentNullException.ThrowIfNull(address);
        return StartOutgoing(address, null, cpr);
    }

    public Task<MigrationStatus> Migrate(IMigrationChannel channel)
    {
        ArgumentNullException.ThrowIfNull(channel);
        return StartOutgoing(null, channel, null);
    }

    public Task<MigrationStatus> MigrateIncoming(MigrationAddress address, bool keepListening = false)
    {
        ArgumentNullException.ThrowIfNull(address);
        WaitForTail();
        lock (_gate)
        {
            CheckIncoming();
            if (Capabilities.IsOn(MigrationCapability.MappedRam) && address.Transport != MigrationTransport.File) throw new ConfigurationException(MappedRamSave.NotSeekable);
            _keepsListening = keepListening && address.IsSocket;
            if (address.IsSocket)
            {
                var listener = MigrationListener.Listen(address);
                _listener?.Dispose();
                _listener = listener;
                MigrationLog.IncomingStarted(_context.Logger, string.Join(", ", listener.Addresses));
                return StartIncoming(() => AcceptLoop(listener, keepListening));
            }
            IMigrationChannel channel = MigrationConnector.OpenAtOnce(address, outgoing: false, TakeNamedFd, OpenFdSet)!;
            return StartIncoming(() => LoadOnce(channel, []));
        }
    }

    public Task<MigrationStatus> MigrateIncoming(IMigrationChannel channel)
    {
        ArgumentNullException.ThrowIfNull(channel);
        WaitForTail();
        lock (_gate)
        {
            CheckIncoming();
            _keepsListening = false;
            return StartIncoming(() => LoadOnce(channel, []));
        }
    }

    public void Cancel()
    {
        OutgoingMigration? outgoing;
        IncomingMigration? incoming;
        lock (_gate)
        {
            outgoing = _isIncoming ? null : _outgoing;
            incoming = _incoming;
            _listener?.Stop();
            // An attempt that has not begun to load yet finds the reason here.
            _incomingEnd ??= new OperationCanceledException("the incoming migration was cancelled");
        }
        outgoing?.Cancel();
        incoming?.Abort(_incomingEnd);
    }

    public void Continue(MigrationStatus state)
    {
        lock (_gate)
        {
            if (Status != state || state != MigrationStatus.PreSwitchover || _outgoing is null)
                throw new ConfigurationException($"Migration not in expected state: {Status.ToWireName()}");
            _outgoing.Continue();
        }
    }

    public IDisposable BeginExclusive()
    {
        WaitForTail();
        lock (_gate)
        {
            ThrowIfBusy();
            _exclusive = true;
            IDisposable frozen = _context.Blockers.Freeze();
            return new Release(() =>
            {
                frozen.Dispose();
                lock (_gate) _exclusive = false;
            });
        }
    }

    /// <summary>
    /// Cancels a running migration and waits for its end. A handler of <see cref="StatusChanged"/> cannot wait for the thread that it runs on, so there this
    /// returns at once, and the VM is disposed behind the migration's end.
    /// </summary>
    public void Dispose()
    {
        _isDisposed = true;
        Cancel();
        lock (_gate) _outgoing?.Abort(new OperationCanceledException("the VM is going away"));
        if (t_notifying == this) _context.Vm.DisposeAfter(Task.Run(DisposeAtEnd));
        else DisposeAtEnd();
    }

    private void DisposeAtEnd()
    {
        Task? running;
        lock (_gate) running = _running;
        running?.Wait();
        _context.Rehearsed.Wait();
        lock (_gate)
        {
            _listener?.Dispose();
            _listener = null;
            _outgoing?.Dispose();
            _outgoing = null;
        }
    }

    private Task<MigrationStatus> StartOutgoing(MigrationAddress? address, IMigrationChannel? channel, MigrationAddress? cpr)
    {
        WaitForTail();
        lock (_gate)
        {
            ThrowIfBusy();
            RunState state = _context.Vm.RunState.State;
            if (state == RunState.InMigrate) throw new DeviceStateException("Guest is waiting for an incoming migration");
            _context.Vm.ThrowIfHeld();
            if (state == RunState.PostMigrate) throw new DeviceStateException("Can't migrate the vm that was paused due to previous migration");
            MigrationMode mode = Parameters.Mode;
            CprRules.Check(mode, address, cpr, Parameters.CprExecCommand);
            _context.Blockers.ThrowIfBlocked(mode);
            if (address is not null) channel = MigrationConnector.OpenAtOnce(address, outgoing: true, TakeNamedFd, OpenFdSet);
            OutgoingMigration outgoing;
            try
            {
                outgoing = new OutgoingMigration(_context, OutgoingPlan.Make(_context, address, channel, cpr), channel);
            }
            catch
            {
                if (channel is FileChannel file) file.Abandon();
                channel?.Dispose();
                throw;
            }
            _outgoing?.Dispose();
            _outgoing = outgoing;
            _isIncoming = false;
            outgoing.Progress.Pass += n => PassCompleted?.Invoke(n);
            _frozen = _context.Blockers.Freeze();
            MigrationLog.OutgoingStarted(_context.Logger, address?.ToString() ?? channel!.Name);
            _context.Machine.TryMoveTo(MigrationStatus.Setup);
            if (_isDisposed) outgoing.Abort(new OperationCanceledException("the VM is going away"));
            Task<MigrationStatus> task = outgoing.Start();
            _running = task.ContinueWith(
                t =>
                {
                    _frozen.Dispose();
                    return t.GetAwaiter().GetResult();
                },
                CancellationToken.None, TaskContinuationOptions.ExecuteSynchronously, TaskScheduler.Default);
            return _running;
        }
    }

    // A caller that has just seen a terminal status may start the next migration, although the thread that reported the status has not ended yet.
    // The wait is limited, because a handler of StatusChanged runs on that very thread.
    private void WaitForTail()
    {
        Task? last = Volatile.Read(ref _running);
        if (last is { IsCompleted: false } && Status.IsTerminal() && !_keepsListening) Task.WaitAny([last], s_tailLimit);
    }

    private void CheckIncoming()
    {
        ThrowIfBusy();
        if (_context.Vm.RunState.State != RunState.InMigrate) throw new DeviceStateException("'-incoming' was not specified on the command line");
    }

    private void ThrowIfBusy()
    {
        ObjectDisposedException.ThrowIf(_isDisposed, this);
        if (_exclusive) throw new MigrationBlockedException("a snapshot is being saved or loaded");
        if (_running is { IsCompleted: false })
            throw new MigrationBlockedException(_isIncoming ? "The incoming migration has already been started" : "There's a migration process in progress");
    }

    private Task<MigrationStatus> StartIncoming(Func<MigrationStatus> body)
    {
        _isIncoming = true;
        _incomingRecord = new IncomingRecord();
        _incomingEnd = null;
        _context.Machine.TryMoveTo(MigrationStatus.Setup);
        MigrationStatus end = MigrationStatus.Failed;
        Task thread = WorkerThread.Run("mig/dst/main", () => end = body());
        _running = thread.ContinueWith(
            t =>
            {
                t.GetAwaiter().GetResult();
                return end;
            },
            CancellationToken.None, TaskContinuationOptions.ExecuteSynchronously, TaskScheduler.Default);
        return _running;
    }

    private MigrationStatus AcceptLoop(MigrationListener listener, bool keepListening)
    {
        try
        {
            using var lobby = new ConnectionLobby(listener, StreamHeader.Start, _context.Logger);
            var accepting = new MultifdAccepting(lobby, listener.Stopped, () => Capabilities.IsOn(MigrationCapability.Multifd) ? Parameters.MultifdChannels : 0);
            while (true)
            {
                if (accepting.Accept() is not { } set) return StopWaiting();
                if (Status.IsTerminal()) _context.Machine.TryMoveTo(MigrationStatus.Setup);
                MigrationStatus end = LoadOnce(set.Main, set.Data, lobby, set.Refusal);
                if (end != MigrationStatus.Failed || !keepListening || _context.Vm.RunState.State != RunState.InMigrate) return end;
            }
        }
        finally
        {
            lock (_gate)
            {
                if (ReferenceEquals(_listener, listener)) _listener = null;
            }
            listener.Dispose();
        }
    }

    private MigrationStatus StopWaiting()
    {
        if (Status == MigrationStatus.Failed) return MigrationStatus.Failed;
        _context.Machine.TryMoveTo(MigrationStatus.Cancelling);
        _context.Machine.TryMoveTo(MigrationStatus.Cancelled);
        return MigrationStatus.Cancelled;
    }

    private MigrationStatus LoadOnce(IMigrationChannel channel, IReadOnlyList<IMigrationChannel> dataChannels, ConnectionLobby? lobby = null, Exception? refusal = null)
    {
        using var incoming = new IncomingMigration(_context, channel, dataChannels) { Lobby = lobby, Refusal = refusal };
        lock (_gate)
        {
            _incoming = incoming;
            _incomingRecord = incoming.Record;
            if (_incomingEnd is { } ended) incoming.Abort(ended);
        }
        MigrationStatus end = incoming.Run();
        lock (_gate) _incoming = null;
        return end;
    }

    private sealed class Release(Action undo) : IDisposable
    {
        private Action? _undo = undo;

        public void Dispose() => Interlocked.Exchange(ref _undo, null)?.Invoke();
    }
}
