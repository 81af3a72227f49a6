using System.Diagnostics;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Core.Wire;
using Vmm.Migration.Attempts;
using Vmm.Migration.Channels;
using Vmm.Migration.Diagnostics;
using Vmm.Migration.Multifd;
using Vmm.Migration.Status;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Incoming;

/// <summary>
/// One attempt to load the VM from a channel, on the thread <c>mig/dst/main</c> (QEMU: <c>process_incoming_migration_co</c>). The VM runs only after the
/// source has let go. A failed attempt resets the VM and leaves it in state inmigrate, ready for the next one, unless the source may have let go: then the
/// VM is held, paused.
/// </summary>
/// <param name="context">The parts of the VM.</param>
/// <param name="channel">Brings the stream; owned.</param>
/// <param name="dataChannels">Channels of multifd, possibly none; owned.</param>
internal sealed class IncomingMigration(MigrationContext context, IMigrationChannel channel, IReadOnlyList<IMigrationChannel> dataChannels) : IDisposable
{
    /// <summary>How long to wait for the commands that open the return path, on which a refused source is told why.</summary>
    private const int RefusalTimeoutMs = 1_000;

    private static readonly TimeSpan s_deliverTimeout = TimeSpan.FromSeconds(10);

    /// <summary>Why a VM is held whose source may have let go.</summary>
    private const string Doubt = "this side has the whole VM and the source's final word has not come, so the source may run it; the VM stays paused here";

    private readonly FaultLatch _latch = new();
    private readonly Receipt _receipt = new();
    private string _phase = "header";
    private volatile IncomingStream? _stream;
    private long _switchoverAt;
    private readonly Lock _reportGate = new();
    private bool _reported;
    private readonly CancellationTokenSource _cancel = new();
    private SilenceWatch? _silence;

    /// <summary>The lobby that accepted the channels, watched while the load runs; null for a channel that was given.</summary>
    internal ConnectionLobby? Lobby { get; init; }

    /// <summary>Why the load must not begin; the source is told if it opens a return path. Null for a good attempt.</summary>
    internal Exception? Refusal { get; init; }

    /// <summary>How it ended.</summary>
    internal IncomingRecord Record { get; } = new();

    internal void Abort(Exception reason) => _latch.Set(reason);

    /// <summary>Fails the load, because a device is gone that its state is for. What has been confirmed is not touched.</summary>
    internal void LoseDevice(Exception reason)
    {
        if (_phase is not ("confirm" or "start")) Refuse(_stream?.ReturnPath, reason);
    }

    public void Dispose()
    {
        channel.Dispose();
        foreach (IMigrationChannel data in dataChannels) data.Dispose();
        _cancel.Dispose();
    }

    internal MigrationStatus Run()
    {
        using IDisposable shut = _latch.OnSet(() =>
        {
            _cancel.Cancel();
            channel.Shutdown(ChannelShutdown.Both);
        });
        // A source that is refused may never open the return path, so the wait for it is limited.
        using Timer? impatience = Refusal is { } refusal ? new(_ => _latch.Set(refusal), null, RefusalTimeoutMs, Timeout.Infinite) : null;
        try
        {
            if (channel is SocketChannel socket) _silence = new SilenceWatch(context, socket, dataChannels, e => _latch.Set(e));
            if (!context.Machine.TryMoveTo(MigrationStatus.Active)) throw new OperationCanceledException();
            // In an update RAM stays in place: the stream is short, and the guest is stopped for most of it.
            RealtimeBoost.During(context.Vm.CprFds.IsIncoming, () => Commit(Load()));
            return End();
        }
#pragma warning disable CA1031 // Fail records it and tells the source; the VM waits for another attempt.
        catch (Exception e)
#pragma warning restore CA1031
        {
            // The source must get the record before the latch shuts the channel; once this side has confirmed there is nothing to report.
            if (_stream is { } stream && _receipt.Stage == DestinationStage.Loading) Report(stream.ReturnPath, _latch.Reason ?? e);
            return Fail(_latch.Reason ?? e);
        }
        finally
        {
            _silence?.Dispose();
        }
    }

    private MigrationStatus End()
    {
        channel.Dispose();
        return context.Machine.TryMoveTo(MigrationStatus.Completed) ? MigrationStatus.Completed : context.Machine.Status;
    }

    private MultifdReceiver Receiver() =>
        new(dataChannels, MultifdSettings.Of(context.Parameters.Current), context.Vm.Uuid, _latch) { MainReceived = () => (channel as SocketChannel)?.ReceivedBytes ?? 0 };

    private IncomingStream Load()
    {
        context.Rehearsed.Wait();
        MultifdReceiver? receiver = dataChannels.Count == 0 ? null : Receiver();
        if (_silence is { } data && receiver is not null) data.WaitsForData = () => receiver.IsWaiting;
        var incoming = _stream = new IncomingStream(context, channel, receiver, OnSwitchover, _cancel.Token);
        // The source of an update opens no other channels.
        ConnectionWatch? watch = Lobby is null || context.Vm.CprFds.IsIncoming ? null
            : new(Lobby, dataChannels.Count, () => channel.PeerHasClosed, e => Refuse(incoming.ReturnPath, e));
        try
        {
            incoming.ReadHeader();
            _phase = "ram";
            incoming.ReadLeadingCommands();
            if (_silence is { } silence) silence.For = incoming.SourceHasFinalWord ? SilenceWatch.Waiting.Live : SilenceWatch.Waiting.Other;
            if (Refusal is not null) throw Refusal;
            incoming.ReadBody();
            ThrowIfIncomplete(incoming, watch);
            _latch.ThrowIfSet();
            return incoming;
        }
        catch (Exception e)
        {
            // A stream that stops early means that the source failed or was cancelled; the message says so.
            if (e is StreamTruncatedException or ChannelException && _latch.Reason is null)
                e = new ChannelException($"{e.Message}; the source ended the migration", Errno.ECONNRESET, e);
            // The source must get the record before the latch shuts the channel. A reason that is stored already stays the reason.
            e = _latch.Reason ?? e;
            Report(incoming.ReturnPath, e);
            watch?.LookOnceMore();
            _latch.Set(e);
            receiver?.Discard();
            watch?.DiscardSurplus();
            receiver?.Dispose();
            System.Runtime.ExceptionServices.ExceptionDispatchInfo.Throw(e);
            throw;
        }
        finally
        {
            watch?.Dispose();
            // Before the sections are cleaned up: the receiver's threads may still be giving them data.
            receiver?.Dispose();
            incoming.Cleanup();
        }
    }

    private static void ThrowIfIncomplete(IncomingStream incoming, ConnectionWatch? watch)
    {
        watch?.ThrowIfSurplus();
        try
        {
            incoming.ThrowIfIncomplete();
        }
        catch (IncompatibleStateException) when (watch?.WaitForSurplus() is { } surplus)
        {
            // Pages that never came may have gone over channels that nobody here reads.
            throw surplus;
        }
    }

    /// <summary>Called on another thread. The source must get the record before the latch shuts the channel.</summary>
    private void Refuse(ReturnPathWriter? returnPath, Exception reason)
    {
        Report(returnPath, reason);
        _latch.Set(reason);
    }

    private void OnSwitchover()
    {
        _phase = "load";
        if (_silence is { } silence) silence.For = SilenceWatch.Waiting.Stopped;
        if (_switchoverAt == 0) _switchoverAt = Stopwatch.GetTimestamp();
    }

    /// <summary>
    /// The hand-over (STREAM.md). This side first makes sure that the VM can start here. From the confirmation on it keeps the VM, whatever happens, and starts
    /// it only when the source has let go.
    /// </summary>
    private void Commit(IncomingStream reader)
    {
        _phase = "confirm";
        double loadMs = _switchoverAt == 0 ? 0 : Stopwatch.GetElapsedTime(_switchoverAt).TotalMilliseconds;
        using (context.Vm.Bql.Acquire()) context.Vm.RunState.ThrowIfCannotStart();
        if (reader.ReturnPath is { } returnPath)
        {
            Confirm(reader, returnPath);
        }
        else
        {
            // Without a return path nobody asks: a complete VM is this side's.
            if (!_receipt.TryConfirm(hasFinalWord: false)) _latch.ThrowIfSet();
            _receipt.On(DestinationEvent.Delivered);
        }
        _phase = "start";
        long startAt = Stopwatch.GetTimestamp(), guestAtNs;
        using (context.Vm.Bql.Acquire())
        {
            context.Vm.CprFds.EndIncoming();
            Start(reader.GlobalState);
            guestAtNs = context.Vm.RunState.IsRunning ? context.Vm.Accelerator?.RunTimes.EnteredAtNs ?? 0 : 0;
        }
        var downtime = new DowntimeReport
        {
            AtNs = MonotonicClock.NowNs, LoadMs = loadMs, StartMs = Stopwatch.GetElapsedTime(startAt).TotalMilliseconds,
            TotalMs = _switchoverAt == 0 ? 0 : Stopwatch.GetElapsedTime(_switchoverAt).TotalMilliseconds, GuestAtNs = guestAtNs,
        };
        context.LogDowntime(downtime);
        Record.Downtime = downtime;
    }

    private void Confirm(IncomingStream reader, ReturnPathWriter returnPath)
    {
        _latch.ThrowIfSet();
        if (channel.PeerHasClosed || (reader.SourceHasFinalWord && reader.HasUnread && reader.ReadFinalWord() == MigCommand.VmmWithdrawn))
            throw new ChannelException($"{channel.Name}: the source cancelled the migration", Errno.ECANCELED);
        if (!_receipt.TryConfirm(reader.SourceHasFinalWord)) _latch.ThrowIfSet();
        if (reader.SourceHasFinalWord)
        {
            WaitFinalWord(reader, returnPath);
            return;
        }
        returnPath.SendShut(null);
        if (channel.Drain(s_deliverTimeout)) _receipt.On(DestinationEvent.Delivered);
        else throw new ChannelException($"{channel.Name}: the confirmation did not reach the source", Errno.ETIMEDOUT);
    }

    private void WaitFinalWord(IncomingStream reader, ReturnPathWriter returnPath)
    {
        if (_silence is { } silence) silence.For = SilenceWatch.Waiting.Stopped;
        try
        {
            returnPath.SendShut(null);
        }
        catch (ChannelException)
        {
            // The source may have gone and left its final word behind, which is read next.
        }
        if (reader.ReadFinalWord() == MigCommand.VmmReleased)
        {
            _receipt.On(DestinationEvent.Released);
            return;
        }
        _receipt.On(DestinationEvent.Withdrawn);
        throw new ChannelException($"{channel.Name}: the source cancelled the migration", Errno.ECANCELED);
    }

    /// <summary>Starts the VM, which is this side's now. A handler that refuses leaves it paused; <c>cont</c> tries again. BQL: held.</summary>
    private void Start(GlobalState? global)
    {
        try
        {
            EnterRunState(global);
        }
        catch (DeviceStateException e)
        {
            Record.Error = MigrationErrors.From("destination", _phase, e);
            MigrationLog.Failed(context.Logger, Record.Error.ToString());
            if (context.Vm.RunState.State == RunState.InMigrate) context.Vm.RunState.Set(RunState.Paused);
        }
    }

    /// <summary>Enters the run state that stream 10.2 gives for the source's. BQL: held.</summary>
    private void EnterRunState(GlobalState? global)
    {
        IRunStateNotifier runState = context.Vm.RunState;
        bool autoStart = context.Vm.AutoStart;
        RunState received = global?.Received ?? RunState.Running;
        switch (received)
        {
            case RunState.Running when autoStart:
                runState.Start();
                break;
            case RunState.Running:
                runState.Set(RunState.Paused);
                break;
            case RunState.Suspended:
                runState.Set(autoStart ? RunState.Suspended : RunState.Paused);
                runState.WasSuspended = !autoStart;
                break;
            default:
                // A state that cannot follow inmigrate was a temporary one at the source. The guest did not run there, so it stays paused.
                runState.Set(RunStateTable.IsLegal(RunState.InMigrate, received) ? received : RunState.Paused);
                runState.WasSuspended = received == RunState.Paused && global is { ReceivedWasSuspended: true };
                break;
        }
    }

    private void Report(ReturnPathWriter? returnPath, Exception reason)
    {
        // Only the first reason is sent. Whoever has another one waits for that, because it shuts the channel afterwards.
        lock (_reportGate)
        {
            if (_reported) return;
            _reported = true;
            MigrationError error = MigrationErrors.From("destination", _phase, reason);
            Record.Error = error;
            if (returnPath is null) return;
            try
            {
                returnPath.SendShut(error);
                channel.Drain(TimeSpan.FromMilliseconds(200));
            }
            catch (VmmException)
            {
                // The source is gone; the record stays on this side.
            }
        }
    }

    /// <summary>A device that cannot be reset must not keep a failed attempt from its end; the next attempt finds it as it is and refuses. BQL: held.</summary>
    private void ResetDevices()
    {
        try
        {
            context.Vm.ResetDevices();
        }
        catch (DeviceStateException e)
        {
            MigrationLog.ResetFailed(context.Logger, e.Message);
        }
    }

    private MigrationStatus Fail(Exception reason)
    {
        _latch.Set(reason);
        bool cancelled = reason is OperationCanceledException;
        DestinationStage stage = _receipt.On(cancelled ? DestinationEvent.Cancelled : DestinationEvent.Lost);
        bool isInDoubt = stage == DestinationStage.InDoubt;
        if (isInDoubt || !cancelled) Record.Error ??= MigrationErrors.From("destination", _phase, reason);
        if (isInDoubt) Record.Error = Record.Error! with { Message = $"{Record.Error.Message}; {Doubt}", Hint = "look at the source: if its migration is completed, or it is gone, start the VM here with 'cont --force'; else quit here" };
        using (context.Vm.Bql.Acquire())
        {
            if (isInDoubt || stage == DestinationStage.Here)
            {
                // The only complete state may be this one, so it must not be reset.
                if (context.Vm.RunState.State == RunState.InMigrate) context.Vm.RunState.Set(RunState.Paused);
                if (isInDoubt) context.Vm.Hold(Doubt);
            }
            else if (!context.Vm.CprFds.IsIncoming)
            {
                // The source of an update goes on with the memory and devices whose descriptors it sent, so nothing here may touch them.
                ResetDevices();
            }
        }
        channel.Dispose();
        if (Record.Error is { } error) MigrationLog.Failed(context.Logger, error.ToString());
        if (cancelled && !isInDoubt)
        {
            context.Machine.TryMoveTo(MigrationStatus.Cancelling);
            context.Machine.TryMoveTo(MigrationStatus.Cancelled);
            return MigrationStatus.Cancelled;
        }
        context.Machine.TryMoveTo(MigrationStatus.Failing);
        context.Machine.TryMoveTo(MigrationStatus.Failed);
        return MigrationStatus.Failed;
    }
}
