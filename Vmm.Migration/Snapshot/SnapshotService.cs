using System.Runtime.ExceptionServices;
using Microsoft.Extensions.Logging;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Attempts;
using Vmm.Migration.Channels;
using Vmm.Migration.Diagnostics;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Snapshot;

/// <summary>Options of a VM's snapshots.</summary>
public sealed record SnapshotOptions
{
    /// <summary>The directory of the snapshots; made with the first one.</summary>
    public string Directory { get; init; } = "snapshots";
}

/// <summary>
/// Saves and loads snapshots of the whole VM in the stream format of an ordinary migration (stream 15). A load first reads the whole file without changing
/// RAM, so that a bad snapshot is found before anything has changed. The VM's state is held still meanwhile; the BQL is taken only for the sections that
/// need it.
/// </summary>
internal sealed class SnapshotService(Vm vm, IAttempts attempts, SnapshotOptions options, ILoggerFactory loggers) : ISnapshotService
{
    private readonly DirectorySnapshotStore _store = new(options.Directory, loggers.CreateLogger("Vmm.Migration.Snapshot"));

    public string Location => _store.Location;

    private MigrationContext Context => attempts.Context;

    /// <summary>A snapshot uses no other process and no other channel, so of all capabilities only this one applies.</summary>
    private MigrationCapabilities Capabilities =>
        MigrationCapabilities.None.With(MigrationCapability.ValidateUuid, Context.Capabilities.IsOn(MigrationCapability.ValidateUuid));

    public SnapshotManifest Save(string name, bool overwrite, Action<long, long>? progress, CancellationToken cancel)
    {
        DirectorySnapshotStore.CheckName(name);
        // After an incoming migration that failed, RAM holds a part of another VM.
        if (vm.RunState.State == RunState.InMigrate) throw new DeviceStateException("Guest is waiting for an incoming migration");
        if (!overwrite && _store.Exists(name)) throw new ConfigurationException($"Snapshot '{name}' already exists in one or more devices");
        using IDisposable exclusive = attempts.BeginExclusive();
        Context.Blockers.ThrowIfBlocked(MigrationMode.Normal);
        if (vm.RunState.State == RunState.InternalError)
            throw new DeviceStateException("the VM is in internal-error: its state may be incomplete") { Hint = "load a snapshot that is whole, or reset the VM" };
        (string aside, FileChannel file) = _store.Begin();
        try
        {
            SnapshotManifest manifest;
            DeviceStateException? problem;
            using (file)
            using (var channel = new HashingChannel(file, (long)vm.Memory.TotalBytes, progress, cancel))
            {
                (manifest, problem) = WriteStream(name, channel, cancel);
                channel.Drain(TimeSpan.Zero);
            }
            _store.Commit(aside, manifest, overwrite);
            if (problem is not null) throw new DeviceStateException($"snapshot '{name}' is saved, but {problem.Message}", problem) { Hint = problem.Hint };
            return manifest;
        }
        finally
        {
            // After a commit the directory has another name; this then removes the snapshot that was replaced.
            _store.Discard(aside);
        }
    }

    public void Load(string name, Action<long, long>? progress, CancellationToken cancel)
    {
        (SnapshotManifest manifest, Func<FileChannel> open) = _store.Find(name);
        if (vm.RunState.State == RunState.InMigrate) throw new DeviceStateException("Guest is waiting for an incoming migration");
        vm.ThrowIfHeld();
        using IDisposable exclusive = attempts.BeginExclusive();
        // Check and load use one descriptor, so that the file that was checked is loaded even if the name changes meanwhile.
        using FileChannel file = open();
        DeviceStateException? problem = Stopped(RunState.RestoreVm, guest =>
        {
            Check(manifest, file, progress, cancel);
            StateOverwrite.Run(vm, $"loading snapshot '{name}'", () =>
            {
                using (vm.Bql.Acquire()) vm.ResetDevices();
                ReadWhole(manifest, file, validateOnly: false, null, CancellationToken.None);
            });
            // The whole state has been replaced, so what made a reset necessary is gone.
            if (RunStateTable.NeedsReset(guest.Before)) using (vm.Bql.Acquire()) vm.RunState.Set(RunState.Paused);
        });
        if (problem is not null) throw new DeviceStateException($"snapshot '{name}' is loaded, but {problem.Message}", problem) { Hint = problem.Hint };
    }

    public bool Delete(string name)
    {
        using IDisposable exclusive = attempts.BeginExclusive();
        return _store.Delete(name);
    }

    public IReadOnlyList<SnapshotManifest> List() => _store.List();

    /// <summary>
    /// Stops a live guest and holds the VM's state during an action; any other guest keeps its run state. Afterwards the guest is put back and calls that
    /// waited for the VM's state go on. A VM in internal-error stays there.
    /// </summary>
    /// <returns>Why the guest could not be started again after the action, or null.</returns>
    /// <exception cref="VmmException">A device failed to stop, or the action failed; if the guest could not be started again, the message says so too.</exception>
    private DeviceStateException? Stopped(RunState state, Action<StoppedGuest> action)
    {
        StoppedGuest guest;
        IDisposable? hold = null;
        Exception? failure = null;
        using (vm.Bql.Acquire()) guest = new StoppedGuest(vm);
        try
        {
            using (vm.Bql.Acquire())
            {
                if (RunStateTable.IsLive(vm.RunState.State)) guest.Stop(state);
                hold = vm.HoldState();
            }
            action(guest);
        }
#pragma warning disable CA1031 // The guest is put back first, then the exception goes on.
        catch (Exception e)
#pragma warning restore CA1031
        {
            failure = e;
        }
        DeviceStateException? problem;
        using (vm.Bql.Acquire())
        {
            problem = guest.GoOn();
            hold?.Dispose();
        }
        if (failure is null) return problem;
        if (problem is not null) throw new DeviceStateException($"{VmmException.Describe(failure)}; and {problem.Message}", failure) { Hint = problem.Hint };
        ExceptionDispatchInfo.Throw(failure);
        return null;
    }

    private (SnapshotManifest Manifest, DeviceStateException? Problem) WriteStream(string name, HashingChannel channel, CancellationToken cancel)
    {
        using var f = new QemuFileWriter(channel);
        var context = new SaveContext { IsSnapshot = true, Capabilities = Capabilities, Compat = Context.Compat, Cancel = cancel };
        SnapshotManifest manifest = null!;
        DeviceStateException? problem = Stopped(RunState.SaveVm, guest =>
        {
            Write(f, new SaveStream(vm.SaveVm, f, context), guest);
            manifest = new SnapshotManifest
            {
                Name = name, CreatedUtc = DateTimeOffset.UtcNow, Machine = vm.Machine, StreamBytes = f.Position, RamBytes = (long)vm.Memory.TotalBytes,
                VmClockNs = vm.Clock.NowNs, Checksum = channel.Finish(), RunState = guest.Before.ToWireName(),
            };
        });
        return (manifest, problem);
    }

    /// <summary>Writes the stream. Devices are told of it as of a migration, so that they are out of their migration states before the guest goes on.</summary>
    private void Write(QemuFileWriter f, SaveStream stream, StoppedGuest guest)
    {
        MigrationEvent end = MigrationEvent.PrecopyFailed;
        try
        {
            using (vm.Bql.Acquire())
            {
                Context.Notifiers.Notify(MigrationEvent.PrecopySetup, MigrationMode.Normal);
                stream.SavePrepare();
                stream.Find<GlobalState>()?.Store(guest.Before, guest.WasSuspended);
                StreamHeader.Write(f, Context.Identity, stream.Context);
                stream.SaveSetup();
            }
            while (stream.SaveLiveIterate(IterateBudget.Unlimited) == SaveProgress.More) { }
            using (vm.Bql.Acquire())
            {
                stream.SaveLiveCompletePrecopy();
                stream.SaveState();
            }
            StreamEnd.Write(f, stream, Context.Identity);
            f.Flush();
            end = MigrationEvent.PrecopyDone;
        }
        finally
        {
            End(stream, end);
        }
    }

    /// <summary>Ends the attempt in the devices. What one of them throws here is logged: the stream is what counts, and the guest goes on in any case.</summary>
    private void End(SaveStream stream, MigrationEvent end)
    {
        foreach (Action step in (Action[])[() => { using (vm.Bql.Acquire()) Context.Notifiers.Notify(end, MigrationMode.Normal); }, stream.SaveCleanup])
        {
            try
            {
                step();
            }
#pragma warning disable CA1031 // The guest goes on whatever a device throws here.
            catch (Exception e)
#pragma warning restore CA1031
            {
                MigrationLog.SnapshotEndFailed(Context.Logger, e.Message);
            }
        }
    }

    /// <summary>
    /// Reads the whole file to check it: checksum, framing, RAM records and block names. Declared states are loaded into the devices; if the check fails, their
    /// present state is put back.
    /// </summary>
    private void Check(SnapshotManifest manifest, FileChannel file, Action<long, long>? progress, CancellationToken cancel)
    {
        using StateCopy copy = TakeCopy();
        try
        {
            ReadWhole(manifest, file, validateOnly: true, progress, cancel);
        }
#pragma warning disable CA1031 // The devices' state is put back, then the exception goes on.
        catch (Exception failure)
#pragma warning restore CA1031
        {
            StateOverwrite.Run(vm, $"putting the devices' state back after snapshot '{manifest.Name}' could not be loaded ({failure.Message})", () =>
            {
                using (vm.Bql.Acquire())
                {
                    vm.ResetDevices(ResetType.UndoCheck);
                    copy.PutBack();
                }
            });
            throw;
        }
    }

    private StateCopy TakeCopy()
    {
        using (vm.Bql.Acquire()) return StateCopy.Take(vm.SaveVm);
    }

    /// <summary>Reads the file from start to end and compares the checksum; the file may have changed since the last reading.</summary>
    private void ReadWhole(SnapshotManifest manifest, FileChannel file, bool validateOnly, Action<long, long>? progress, CancellationToken cancel)
    {
        file.Position = 0;
        using var channel = new HashingChannel(file, manifest.StreamBytes, progress, cancel);
        ReadStream(new QemuFileReader(channel), new LoadContext
        {
            IsSnapshot = true, Capabilities = Capabilities, Compat = Context.Compat, ValidateOnly = validateOnly, Cancel = cancel,
        });
        Span<byte> waste = stackalloc byte[4096];
        while (channel.Read(waste) > 0) { }
        string checksum = channel.Finish();
        if (checksum == manifest.Checksum) return;
        throw new StreamFormatException($"snapshot '{manifest.Name}': checksum differs, {manifest.Checksum} in the manifest, {checksum} of the stream")
        {
            Expected = manifest.Checksum, Found = checksum,
        };
    }

    private void ReadStream(QemuFileReader f, LoadContext context)
    {
        var commands = new CommandReader(f, null);
        var stream = new LoadStream(vm.SaveVm, f, context) { ReadCommand = commands.Read };
        commands.Sections = stream;
        try
        {
            StreamHeader.Read(f, Context.Identity, context);
            stream.LoadSetup();
            stream.ReadSections();
            StreamEnd.Skip(f, context);
            stream.ThrowIfIncomplete();
        }
        finally
        {
            stream.LoadCleanup();
        }
    }
}
