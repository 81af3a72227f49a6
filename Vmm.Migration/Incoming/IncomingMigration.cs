using System.Diagnostics;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.RunStates;
using Vmm.Core.Threading;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;
using Vmm.Migration.Diagnostics;
using Vmm.Migration.Multifd;
using Vmm.Migration.Ram;
using Vmm.Migration.State;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Incoming;

/// <summary>
/// One attempt to load the VM from a channel, on the thread <c>mig/dst/main</c> (QEMU: <c>process_incoming_migration_co</c>). The VM runs
/// only after the source has our confirmation; a failed attempt leaves the VM in state inmigrate, reset, ready for another.
/// </summary>
/// <param name="context">The VM.</param>
/// <param name="channel">Where the stream comes from; owned.</param>
/// <param name="dataChannels">Channels of multifd; owned, perhaps none.</param>
internal sealed class IncomingMigration(MigrationContext context, IMigrationChannel channel, IReadOnlyList<IMigrationChannel> dataChannels) : IDisposable
{
    /// <summary>A peer that connects must say who it is within this time, or the next one gets its turn.</summary>
    private const int FirstByteTimeoutMs = 10_000;

    /// <summary>For the commands that open the return path, when the source is to be told why it is refused.</summary>
    private const int RefusalTimeoutMs = 1_000;

    private static readonly TimeSpan s_confirmTimeout = TimeSpan.FromSeconds(10);

    private readonly FaultLatch _latch = new();
    private string _phase = "header";
    private long _switchoverAt;
    private int _reported;

    private MigrationError? _error;

    /// <summary>Where the channels came in, watched while the load runs; null for a channel that was given.</summary>
    internal MigrationListener? Listener { get; init; }

    /// <summary>Why the load must not begin; the source is told, where it listens.</summary>
    internal Exception? Refusal { get; init; }

    /// <summary>Told the record of a failure before the status says so.</summary>
    internal Action<MigrationError>? Failed { get; set; }

    /// <summary>Told the figures before the status says completed.</summary>
    internal Action<DowntimeReport>? Loaded { get; set; }

    internal void Abort(Exception reason) => _latch.Set(reason);

    public void Dispose()
    {
        channel.Dispose();
        foreach (IMigrationChannel data in dataChannels) data.Dispose();
    }

    internal MigrationStatus Run()
    {
        using IDisposable shut = _latch.OnSet(() => channel.Shutdown(ChannelShutdown.Both));
        // A peer that is refused anyway need not say anything before it is told.
        using Timer? impatience = Refusal is { } refusal ? new(_ => _latch.Set(refusal), null, RefusalTimeoutMs, Timeout.Infinite) : null;
        SectionReader? reader = null;
        try
        {
            if (channel is SocketChannel socket && !socket.WaitReadable(FirstByteTimeoutMs))
                throw new ChannelException($"{channel.Name}: the peer connected and sent nothing for {FirstByteTimeoutMs / 1000} s", Errno.ETIMEDOUT);
            if (!context.Machine.TryMoveTo(MigrationStatus.Active)) throw new OperationCanceledException();
            // With RAM in place the stream is short, and the guest stands still from its middle to its end.
            RealtimeBoost.During(context.Vm.CprFds.IsIncoming, () =>
            {
                reader = Load();
                Commit(reader);
            });
            channel.Dispose();
            return context.Machine.TryMoveTo(MigrationStatus.Completed) ? MigrationStatus.Completed : context.Machine.Status;
        }
#pragma warning disable CA1031 // Every failure is this attempt's reason; it is recorded, reported to the source and the VM waits for another attempt.
        catch (Exception e)
#pragma warning restore CA1031
        {
            return Fail(_latch.Reason ?? e, reader);
        }
    }

    private SectionReader Load()
    {
        context.Rehearsal.Wait();
        var f = new QemuFileReader(channel);
        MultifdReceiver? receiver = dataChannels.Count == 0 ? null : new(dataChannels, context.Ram, context.Vm.SaveVm, context.Vm.Uuid, _latch);
        context.Ram.Marks = receiver is null ? null : new SyncMarks(receiver.WaitSync);
        context.GlobalState.ClearReceived();
        context.Ram.ExpectsAddresses = context.Capabilities.IsOn(MigrationCapability.XIgnoreShared);
        // Memory that came by descriptor has no pages in the stream, and its source no other channels.
        bool isUpdate = context.Vm.CprFds.IsIncoming;
        context.Ram.IgnoredOnLoad = isUpdate ? IgnoredRam.All : context.Ram.ExpectsAddresses ? IgnoredRam.SharedFiles : IgnoredRam.None;
        var reader = new SectionReader(MachineView.Of(context.Vm), f, context.Compat, context.Capabilities.IsOn(MigrationCapability.ValidateUuid))
        {
            UsesLoadBuffers = receiver is not null,
            SwitchoverAck = context.Capabilities.IsOn(MigrationCapability.SwitchoverAck),
            OpenReturnPath = channel.IsBidirectional ? () => new ReturnPathWriter(channel) : null,
            OnSwitchover = () =>
            {
                _phase = "load";
                if (_switchoverAt == 0) _switchoverAt = Stopwatch.GetTimestamp();
            },
        };
        ConnectionWatch? watch = Listener is null || isUpdate ? null : new(Listener, dataChannels.Count, () => channel.PeerHasClosed, e => Refuse(reader, e));
        try
        {
            reader.ReadHeader();
            _phase = "ram";
            reader.ReadLeadingCommands();
            if (Refusal is not null) throw Refusal;
            reader.LoadSetup();
            receiver?.Start();
            reader.ReadSections();
            receiver?.WaitDevices();
            reader.SkipVmDescription();
            watch?.ThrowIfSurplus();
            receiver?.ThrowIfIncomplete(context.Ram.Marks!.UsesFlush);
            context.Ram.ThrowIfPagesMissing();
            _latch.ThrowIfSet();
        }
        catch (Exception e)
        {
            // The source's view comes first when both know: a stream that stops is a source that failed or was cancelled.
            if (e is StreamTruncatedException or ChannelException && _latch.Reason is null)
                e = new ChannelException($"{e.Message}; the source ended the migration", Errno.ECONNRESET, e);
            // The record goes out before the latch shuts the channel; it is this attempt's reason unless one is stored already.
            e = _latch.Reason ?? e;
            Report(reader, e);
            _latch.Set(e);
            System.Runtime.ExceptionServices.ExceptionDispatchInfo.Throw(e);
            throw;
        }
        finally
        {
            watch?.Dispose();
            context.Ram.Marks = null;
            // Before devices and RAM let go: threads may be giving them data.
            receiver?.Dispose();
            reader.LoadCleanup();
        }
        return reader;
    }

    /// <summary>Called by the watch's thread: the record goes out before the latch shuts the channel.</summary>
    private void Refuse(SectionReader reader, Exception reason)
    {
        Report(reader, reason);
        _latch.Set(reason);
    }

    /// <summary>
    /// The hand-over. The confirmation is delivered before the VM starts, and not sent at all when the source has ended its direction, so
    /// that at no instant both sides run (STREAM.md).
    /// </summary>
    private void Commit(SectionReader reader)
    {
        _phase = "confirm";
        double loadMs = _switchoverAt == 0 ? 0 : Stopwatch.GetElapsedTime(_switchoverAt).TotalMilliseconds;
        if (reader.ReturnPath is { } returnPath)
        {
            _latch.ThrowIfSet();
            if (channel.PeerHasClosed) throw new ChannelException($"{channel.Name}: the source cancelled the migration", Errno.ECANCELED);
            returnPath.SendShut(null);
            if (!channel.Drain(s_confirmTimeout)) throw new ChannelException($"{channel.Name}: the confirmation did not reach the source", Errno.ETIMEDOUT);
        }
        _latch.ThrowIfSet();
        _phase = "start";
        long startAt = Stopwatch.GetTimestamp(), guestAtNs;
        using (context.Vm.Bql.Acquire())
        {
            context.Vm.CprFds.EndIncoming();
            EnterRunState();
            guestAtNs = context.Vm.RunState.IsRunning ? context.Vm.Accelerator?.RunTimes.EnteredAtNs ?? 0 : 0;
        }
        var downtime = new DowntimeReport
        {
            AtNs = MonotonicClock.NowNs, LoadMs = loadMs, StartMs = Stopwatch.GetElapsedTime(startAt).TotalMilliseconds,
            TotalMs = _switchoverAt == 0 ? 0 : Stopwatch.GetElapsedTime(_switchoverAt).TotalMilliseconds, GuestAtNs = guestAtNs,
        };
        context.LogDowntime(downtime);
        Loaded?.Invoke(downtime);
    }

    /// <summary>The table of spec 10.2. BQL: held.</summary>
    private void EnterRunState()
    {
        RunStateNotifier runState = context.Vm.RunState;
        bool autoStart = context.Vm.AutoStart;
        RunState received = context.GlobalState.Received ?? RunState.Running;
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
                // A state that cannot follow inmigrate was a passing one at the source; the guest did not run, so it stays paused.
                runState.Set(RunStateTable.IsLegal(RunState.InMigrate, received) ? received : RunState.Paused);
                runState.WasSuspended = received == RunState.Paused && context.GlobalState.ReceivedWasSuspended;
                break;
        }
    }

    private void Report(SectionReader reader, Exception reason)
    {
        // The first reason wins, and it is told once.
        if (Interlocked.Exchange(ref _reported, 1) != 0) return;
        _error = MigrationErrors.From("destination", _phase, reason);
        if (reader.ReturnPath is not { } returnPath) return;
        try
        {
            returnPath.SendShut(_error);
            channel.Drain(TimeSpan.FromMilliseconds(200));
        }
        catch (VmmException)
        {
            // The source is gone; the record stays on this side.
        }
    }

    private MigrationStatus Fail(Exception reason, SectionReader? reader)
    {
        _latch.Set(reason);
        bool cancelled = reason is OperationCanceledException;
        if (!cancelled) _error ??= MigrationErrors.From("destination", _phase, reason);
        bool started = reader is not null && context.Vm.RunState.State != RunState.InMigrate;
        using (context.Vm.Bql.Acquire())
        {
            if (_phase == "start" && context.Vm.RunState.State == RunState.InMigrate)
            {
                // The source has handed over: the state here is the only complete one and must not be reset. It waits for a cont.
                context.Vm.RunState.Set(RunState.Paused);
                started = true;
            }
            // Memory and devices that came by descriptor are the source's again, which goes on with them: nothing here may touch them.
            if (!started && !context.Vm.CprFds.IsIncoming) context.Vm.ResetDevices();
        }
        channel.Dispose();
        if (_error is { } error)
        {
            Failed?.Invoke(error);
            MigrationLog.Failed(context.Logger, error.ToString());
        }
        if (cancelled)
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
