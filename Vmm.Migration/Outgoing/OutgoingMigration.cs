using System.Buffers.Binary;
using System.Diagnostics;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.Diagnostics;
using Vmm.Migration.Multifd;
using Vmm.Migration.Ram;
using Vmm.Migration.State;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// One attempt to send the VM away, on the thread <c>live_migration</c> (QEMU: <c>migration_thread</c>). The first reason to end is kept in
/// the latch; every way out ends in <see cref="Finish"/>, which puts the VM back into the state it had unless the migration completed.
/// </summary>
internal sealed partial class OutgoingMigration : IDisposable
{
    private readonly MigrationContext _context;
    private readonly MigrationMode _mode;
    private readonly MigrationAddress? _address;
    private readonly MigrationAddress? _cpr;
    private readonly IReadOnlyList<string> _execCommand;
    private readonly FaultLatch _latch = new();
    private readonly CancellationTokenSource _cancel = new();
    private readonly OwnedFd _wake = Posix.EventFd();
    private readonly ManualResetEventSlim _continue = new();
    private readonly Lock _endGate = new();
    private readonly bool _returnPath;
    private readonly bool _switchoverAck;
    private readonly bool _multifd;
    private MultifdSender? _sender;
    private readonly long _startedAt = Stopwatch.GetTimestamp();
    private IMigrationChannel? _channel;
    private ReturnPathReader? _reader;
    private string _phase = "connect";
    private RunState _stateBefore;
    private bool _stopped;
    private bool _everythingSent;
    private bool _lateCancel;
    private Timer? _lastWord;
    private long _handedOver;
    private DowntimeReport? _downtime;

    internal OutgoingMigration(MigrationContext context, MigrationMode mode, MigrationAddress? address, IMigrationChannel? channel, MigrationAddress? cpr)
    {
        _context = context;
        _mode = mode;
        _cpr = cpr;
        _execCommand = context.Parameters.Current.CprExecCommand;
        _address = address;
        _channel = channel;
        bool able = channel?.IsBidirectional ?? address!.IsSocket;
        // Nothing is copied, so both sides must know who has it; a destination answers whether or not it has the capability on.
        bool wanted = context.Capabilities.IsOn(MigrationCapability.ReturnPath) || (mode == MigrationMode.CprTransfer && able);
        if (wanted && !able)
            throw new ConfigurationException($"capability 'return-path' needs a socket; {address?.ToString() ?? channel!.Name} goes one way") { Hint = "switch return-path off, or use tcp: or unix:" };
        _returnPath = wanted;
        _multifd = context.Capabilities.IsOn(MigrationCapability.Multifd);
        if (_multifd && address is not { IsSocket: true }) throw new ConfigurationException("Migration requires multi-channel URIs (e.g. tcp)") { Hint = "switch multifd off, or use tcp: or unix:" };
        if (_multifd && context.Compat.LegacyDescriptions) throw new ConfigurationException("multifd is not implemented for peers before QEMU 9.0, which synchronise it in another way");
        _switchoverAck = context.Capabilities.IsOn(MigrationCapability.SwitchoverAck);
        _ackRequests = _switchoverAck && context.Compat.LegacySwitchoverAck ? 1 : 0;
        _latch.OnSet(() =>
        {
            _cancel.Cancel();
            Posix.SignalEventFd(_wake);
            _continue.Set();
        });
    }

    /// <summary>Figures of this attempt.</summary>
    internal OutgoingProgress Progress { get; } = new();

    internal Task<MigrationStatus> Start() => Task.Run(async () =>
    {
        MigrationStatus end = MigrationStatus.Failed;
        await WorkerThread.Run("live_migration", () => end = Run()).ConfigureAwait(false);
        return end;
    });

    /// <summary>Cancels; once everything has been sent it asks the destination instead, which may already have confirmed.</summary>
    internal void Cancel()
    {
        MigrationStatus status = _context.Machine.Status;
        if (status is not (MigrationStatus.Setup or MigrationStatus.Active or MigrationStatus.PreSwitchover or MigrationStatus.Device)) return;
        if (!_context.Machine.TryMove(status, MigrationStatus.Cancelling)) { Cancel(); return; }
        lock (_endGate)
        {
            if (_everythingSent && _returnPath)
            {
                // The destination may be about to confirm. Ending our direction tells it not to, and what it answers decides (STREAM.md).
                _lateCancel = true;
                // It may never answer, and what was sent may still be on its way, in channels that it does not read.
                _lastWord = new Timer(_ => _latch.Set(new OperationCanceledException("the migration was cancelled")), null, LastWord, Timeout.InfiniteTimeSpan);
                _channel?.Shutdown(ChannelShutdown.Write);
                return;
            }
        }
        _latch.Set(new OperationCanceledException("the migration was cancelled"));
    }

    internal void Continue() => _continue.Set();

    internal void Abort(Exception reason) => _latch.Set(reason);

    public void Dispose()
    {
        _lastWord?.Dispose();
        _channel?.Dispose();
        _cancel.Dispose();
        _wake.Dispose();
        _continue.Dispose();
    }

    private MigrationStatus Run()
    {
        Exception? reason = null;
        QemuFileWriter? f = null;
        SaveDispatcher? dispatcher = null;
        try
        {
            HandOverDescriptors();
            _channel ??= MigrationConnector.Connect(_address!, _wake);
            if (_multifd) ConnectChannels();
            using IDisposable shut = _latch.OnSet(() => _channel.Shutdown(ChannelShutdown.Both));
            f = new QemuFileWriter(_channel);
            Progress.Attach(f);
            dispatcher = new SaveDispatcher(MachineView.Of(_context.Vm), f, _context.Compat, _context.Capabilities.IsOn(MigrationCapability.ValidateUuid));
            Setup(f, dispatcher);
            if (!_context.Machine.TryMove(MigrationStatus.Setup, MigrationStatus.Active)) _latch.ThrowIfSet();
            // CPR sends no pages while the VM runs: there are none, or they go after the stop (spec vfio-migration 7).
            if (_mode == MigrationMode.Normal) Precopy(f, dispatcher);
            else _context.Rehearsal.Wait();
            RealtimeBoost.During(IsUpdate, () => Switchover(f, dispatcher));
            ReplaceProcess();
        }
#pragma warning disable CA1031 // Every failure is this migration's reason; it is recorded and the VM goes on.
        catch (Exception e)
#pragma warning restore CA1031
        {
            reason = FirstReason(e);
            // What the destination confirmed it has, whatever went wrong here meanwhile.
            if (_everythingSent && WasConfirmed()) reason = null;
        }
        string? section = dispatcher?.Section;
        MigrationStatus end = Finish(reason, dispatcher, section);
        f?.Dispose();
        return end;
    }

    /// <summary>All to the same address; each sends its first bytes at once, since a destination waits for them (spec 14.2, 14.3).</summary>
    private void ConnectChannels()
    {
        var channels = new List<IMigrationChannel>();
        try
        {
            while (channels.Count < MultifdPacket.Channels) channels.Add(MigrationConnector.Connect(_address!, _wake));
            _sender = new MultifdSender(channels, _context.Vm.Uuid, _latch, _cancel.Token);
            _context.Ram.Sender = _sender;
            Progress.MultifdBytes = () => _sender.Bytes;
        }
        finally
        {
            if (_sender is null) channels.ForEach(static c => c.Dispose());
        }
    }

    private void HandOverDescriptors()
    {
        if (_cpr is null) return;
        _phase = "cpr";
        if (!CprTransferSender.Send(_cpr, _context.Vm.CprFds, _wake, out _handedOver)) _latch.ThrowIfSet();
        _phase = "connect";
    }

    /// <summary>Where QEMU completes first and can then still fail, this is the migration's last step: it fails like any other.</summary>
    private void ReplaceProcess()
    {
        if (_mode != MigrationMode.CprExec) return;
        _phase = "exec";
        CprExec.Replace(_context.Vm.CprFds, _execCommand);
    }

    /// <summary>RAM stays where it is: little is sent, and for the few milliseconds that this takes its threads go before ordinary ones.</summary>
    private bool IsUpdate => _mode is MigrationMode.CprTransfer or MigrationMode.CprExec;

    /// <summary>QEMU: <c>migrate_ram_is_ignored</c>.</summary>
    private IgnoredRam IgnoredRam() => IsUpdate ? Ram.IgnoredRam.All
        : _context.Capabilities.IsOn(MigrationCapability.XIgnoreShared) ? Ram.IgnoredRam.SharedFiles : Ram.IgnoredRam.None;

    private void Setup(QemuFileWriter f, SaveDispatcher dispatcher)
    {
        _phase = "setup";
        long start = Stopwatch.GetTimestamp();
        _context.GlobalState.Compat = _context.Compat;
        _context.Ram.Ignored = IgnoredRam();
        _context.Ram.DetectZeroPages = _context.Parameters.Current.ZeroPageDetection != ZeroPageDetection.None;
        using (_context.Vm.Bql.Acquire())
        {
            _context.Vm.DeviceTransfer.Reset();
            _context.Notifiers.Notify(MigrationEvent.PrecopySetup, _mode);
            dispatcher.EnableThreads(_sender is not null);
            dispatcher.Prepare();
        }
        dispatcher.WriteHeader();
        if (_returnPath)
        {
            _reader = ReturnPathReader.Start(_channel!, _latch, IsUpdate);
            dispatcher.WriteCommand(MigCommand.OpenReturnPath);
            WritePing(dispatcher, 1);
        }
        using (_context.Vm.Bql.Acquire())
        {
            dispatcher.EnableSwitchoverAck(_switchoverAck);
            dispatcher.Setup(_cancel.Token);
        }
        // The first bytes leave at once: a QEMU destination blocks its monitor until it has seen four of them (spec 14.3).
        f.Flush();
        Progress.SetupMs = (long)Stopwatch.GetElapsedTime(start).TotalMilliseconds;
        _latch.ThrowIfSet();
    }

    private static void WritePing(SaveDispatcher dispatcher, uint value)
    {
        Span<byte> payload = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32BigEndian(payload, value);
        dispatcher.WriteCommand(MigCommand.Ping, payload);
    }

    /// <summary>A failed write often has its cause in the return path: the destination says why, then closes.</summary>
    private Exception FirstReason(Exception error)
    {
        if (_latch.Reason is null && _reader is not null && error is ChannelException)
        {
            _channel!.Shutdown(ChannelShutdown.Write);
            _reader.WaitEnd(TimeSpan.FromMilliseconds(500));
        }
        _latch.Set(error);
        return _latch.Reason!;
    }

    /// <summary>What it said before the channel was shut is still read; after that it can say nothing more.</summary>
    private bool WasConfirmed()
    {
        _channel!.Shutdown(ChannelShutdown.Both);
        _reader!.Completion.Wait();
        return _reader.WaitEnd(TimeSpan.Zero) == ReturnPathEnd.Confirmed;
    }

    private MigrationStatus Finish(Exception? reason, SaveDispatcher? dispatcher, string? section)
    {
        MigrationStateMachine machine = _context.Machine;
        bool cancelled = reason is OperationCanceledException || (reason is not null && machine.Status == MigrationStatus.Cancelling);
        if (reason is not null && !cancelled)
        {
            Progress.Error = MigrationErrors.From("source", _phase, reason, section);
            machine.TryMoveTo(MigrationStatus.Failing);
        }
        if (reason is not null) _latch.Set(reason);
        _context.Ram.Sender = null;
        dispatcher?.JoinThreads();
        _sender?.Dispose();
        _latch.Set(reason ?? new OperationCanceledException("the migration has ended"));
        if (reason is null) dispatcher?.Cleanup();
        if (reason is not null && _channel is FileChannel file) file.Abandon();
        // A descriptor that the return path's reader is blocked on stays open when it is closed; only a shutdown wakes the reader.
        if (reason is not null) _channel?.Shutdown(ChannelShutdown.Both);
        _channel?.Dispose();
        _reader?.Completion.Wait();
        using (_context.Vm.Bql.Acquire())
        {
            if (reason is null) _context.Vm.RunState.Set(RunState.PostMigrate);
            else _context.Vm.CprFds.IsLeaving = false;
            Notify(reason is null ? MigrationEvent.PrecopyDone : MigrationEvent.PrecopyFailed);
            // Devices take back what the migration did to them before the guest runs, and let go of the rest after.
            if (reason is not null) GoOnHere();
        }
        if (reason is not null) dispatcher?.Cleanup();
        Progress.TotalMs = (long)Stopwatch.GetElapsedTime(_startedAt).TotalMilliseconds;
        Progress.Freeze(_context.Ram);
        _context.Ram.Ignored = Ram.IgnoredRam.None;
        MigrationStatus end = reason is null ? MigrationStatus.Completed : cancelled ? MigrationStatus.Cancelled : MigrationStatus.Failed;
        if (reason is null && (Progress.Downtime = _downtime) is { } downtime) _context.LogDowntime(downtime);
        if (Progress.Error is { } error) MigrationLog.Failed(_context.Logger, error.ToString());
        if (!machine.TryMoveTo(end)) throw new InvalidOperationException($"migration ended in {machine.Status}, expected {end}");
        return end;
    }

    private void Notify(MigrationEvent what)
    {
        try
        {
            _context.Notifiers.Notify(what, _mode);
        }
#pragma warning disable CA1031 // Whatever a device makes of it, the VM has to go on.
        catch (Exception e)
#pragma warning restore CA1031
        {
            MigrationLog.RestartFailed(_context.Logger, e.Message);
        }
    }

    /// <summary>Puts the VM back into the state it had (QEMU: the tail of <c>migration_iteration_finish</c>). BQL: held.</summary>
    private void GoOnHere()
    {
        if (!_stopped) return;
        try
        {
            if (RunStateTable.IsRunning(_stateBefore)) _context.Vm.RunState.Start();
            else if (_context.Vm.RunState.State == RunState.FinishMigrate) _context.Vm.RunState.Set(_stateBefore);
            // The stop noted that the guest was suspended; it is again, so there is nothing left to note.
            if (_stateBefore == RunState.Suspended) _context.Vm.RunState.WasSuspended = false;
        }
        catch (VmmException e)
        {
            MigrationLog.RestartFailed(_context.Logger, e.Message);
            Progress.Error = Progress.Error is { } error ? error with { Message = $"{error.Message}; and the VM could not be restarted: {e.Message}" } : null;
        }
    }
}
