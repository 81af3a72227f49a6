using Microsoft.Extensions.Logging;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Attempts;
using Vmm.Migration.Channels;
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
        if (!overwrite && _store.Exists(name)) throw new ConfigurationException($"Snapshot '{name}' already exists in one or more devices");
        using IDisposable exclusive = attempts.BeginExclusive();
        Context.Blockers.ThrowIfBlocked(MigrationMode.Normal);
        if (vm.RunState.State == RunState.InternalError)
            throw new DeviceStateException("the VM is in internal-error: its state may be incomplete") { Hint = "load a snapshot that is whole, or reset the VM" };
        (string aside, FileChannel file) = _store.Begin();
        try
        {
            SnapshotManifest manifest;
            using (file)
            using (var channel = new HashingChannel(file, (long)vm.Memory.TotalBytes, progress, cancel))
            {
                manifest = WriteStream(name, channel, cancel);
                channel.Drain(TimeSpan.Zero);
            }
            _store.Commit(aside, manifest, overwrite);
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
        StoppedGuest guest = Stop(RunState.RestoreVm, out IDisposable hold);
        try
        {
            Check(manifest, file, progress, cancel);
            StateOverwrite.Run(vm, $"loading snapshot '{name}'", () =>
            {
                using (vm.Bql.Acquire()) vm.ResetDevices();
                ReadWhole(manifest, file, validateOnly: false, null, CancellationToken.None);
            });
            if (guest.Before == RunState.InternalError) using (vm.Bql.Acquire()) vm.RunState.Set(RunState.Paused);
        }
        finally
        {
            GoOn(guest, hold);
        }
    }

    public bool Delete(string name)
    {
        using IDisposable exclusive = attempts.BeginExclusive();
        return _store.Delete(name);
    }

    public IReadOnlyList<SnapshotManifest> List() => _store.List();

    /// <summary>
    /// Stops a live guest and holds the VM's state; any other guest keeps its run state. If a device fails to stop, the guest goes on and this throws.
    /// </summary>
    private StoppedGuest Stop(RunState state, out IDisposable hold)
    {
        using (vm.Bql.Acquire())
        {
            var guest = new StoppedGuest(vm);
            try
            {
                if (RunStateTable.IsLive(guest.Before)) guest.Stop(state);
            }
            catch
            {
                guest.GoOn();
                throw;
            }
            hold = vm.HoldState();
            return guest;
        }
    }

    /// <summary>Puts the guest back, then lets calls that waited for the VM's state go on. A VM in internal-error stays there.</summary>
    private void GoOn(StoppedGuest guest, IDisposable hold)
    {
        using (vm.Bql.Acquire())
        {
            try
            {
                if (vm.RunState.State != RunState.InternalError) guest.GoOn();
            }
            finally
            {
                hold.Dispose();
            }
        }
    }

    private SnapshotManifest WriteStream(string name, HashingChannel channel, CancellationToken cancel)
    {
        using var f = new QemuFileWriter(channel);
        var context = new SaveContext { IsSnapshot = true, Capabilities = Capabilities, Compat = Context.Compat, Cancel = cancel };
        var stream = new SaveStream(vm.SaveVm, f, context);
        StoppedGuest guest = Stop(RunState.SaveVm, out IDisposable hold);
        try
        {
            Write(f, stream, guest);
            return new SnapshotManifest
            {
                Name = name, CreatedUtc = DateTimeOffset.UtcNow, Machine = vm.Machine, StreamBytes = f.Position, RamBytes = (long)vm.Memory.TotalBytes,
                VmClockNs = vm.Clock.NowNs, Checksum = channel.Finish(), RunState = guest.Before.ToWireName(),
            };
        }
        finally
        {
            GoOn(guest, hold);
        }
    }

    private void Write(QemuFileWriter f, SaveStream stream, StoppedGuest guest)
    {
        try
        {
            using (vm.Bql.Acquire())
            {
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
        }
        finally
        {
            stream.SaveCleanup();
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
