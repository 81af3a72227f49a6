using Microsoft.Extensions.Logging;
using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Incoming;
using Vmm.Migration.Outgoing;
using Vmm.Migration.State;

namespace Vmm.Migration.Snapshot;

/// <summary>Where a VM keeps its snapshots.</summary>
public sealed record SnapshotOptions
{
    /// <summary>The directory; made with the first snapshot.</summary>
    public string Directory { get; init; } = "snapshots";
}

/// <summary>
/// Saves and loads whole-VM snapshots in the stream format of an ordinary migration (spec 15). A load first runs through the whole file with
/// RAM left alone, so that a snapshot that cannot be loaded is found before anything has changed.
/// </summary>
internal sealed class SnapshotService(Vm vm, MigrationEngine engine, SnapshotOptions options, ILoggerFactory loggers) : ISnapshotService
{
    private readonly DirectorySnapshotStore _store = new(options.Directory, loggers.CreateLogger("Vmm.Migration.Snapshot"));

    public string Location => _store.Location;

    private MigrationContext Context => engine.Context;

    public SnapshotManifest Save(string name, bool overwrite, Action<long, long>? progress, CancellationToken cancel)
    {
        DirectorySnapshotStore.CheckName(name);
        if (!overwrite && _store.Exists(name)) throw new ConfigurationException($"Snapshot '{name}' already exists in one or more devices");
        using IDisposable exclusive = engine.BeginExclusive();
        Context.Blockers.ThrowIfBlocked(MigrationMode.Normal);
        if (vm.RunState.State == RunState.InternalError)
            throw new DeviceStateException("the VM is in internal-error: its state may be incomplete") { Hint = "load a snapshot that is whole, or reset the VM" };
        (string aside, Channels.FileChannel file) = _store.Begin();
        try
        {
            SnapshotManifest manifest;
            using (file)
            using (var channel = new HashingChannel(file, (long)vm.Memory.TotalBytes, progress, cancel))
            {
                manifest = WriteStream(name, channel);
                channel.Drain(TimeSpan.Zero);
            }
            _store.Commit(aside, manifest, overwrite);
            return manifest;
        }
        finally
        {
            // After a commit the directory has its name and nothing is left to discard.
            DirectorySnapshotStore.Discard(aside);
        }
    }

    public void Load(string name, Action<long, long>? progress, CancellationToken cancel)
    {
        (SnapshotManifest manifest, Func<Channels.FileChannel> open) = _store.Find(name);
        if (vm.RunState.State == RunState.InMigrate) throw new DeviceStateException("Guest is waiting for an incoming migration");
        using IDisposable exclusive = engine.BeginExclusive();
        // One descriptor for check and load: what was checked is loaded, whatever becomes of the name meanwhile.
        using Channels.FileChannel file = open();
        using (vm.Bql.Acquire())
        {
            RunState before = vm.RunState.State;
            bool live = RunStateTable.IsLive(before);
            if (live) vm.RunState.Stop(RunState.RestoreVm);
            try
            {
                Rehearse(manifest, file, progress, cancel);
                StateOverwrite.Run(vm, $"loading snapshot '{name}'", () =>
                {
                    vm.ResetDevices();
                    ReadWhole(manifest, file, null, CancellationToken.None);
                });
                if (before == RunState.InternalError) vm.RunState.Set(RunState.Paused);
            }
            finally
            {
                if (live && vm.RunState.State == RunState.RestoreVm) Resume(before);
            }
        }
    }

    public bool Delete(string name)
    {
        using IDisposable exclusive = engine.BeginExclusive();
        return _store.Delete(name);
    }

    public IReadOnlyList<SnapshotManifest> List() => _store.List();

    private SnapshotManifest WriteStream(string name, HashingChannel channel)
    {
        using var f = new QemuFileWriter(channel);
        using (vm.Bql.Acquire())
        {
            RunState before = vm.RunState.State;
            bool live = RunStateTable.IsLive(before);
            Context.GlobalState.Compat = Context.Compat;
            Context.GlobalState.Store(before, vm.RunState.WasSuspended);
            if (live) vm.RunState.Stop(RunState.SaveVm);
            var dispatcher = new SaveDispatcher(MachineView.Of(vm), f, Context.Compat, Context.Capabilities.IsOn(MigrationCapability.ValidateUuid));
            try
            {
                Context.Ram.DetectZeroPages = true;
                dispatcher.Prepare();
                dispatcher.WriteHeader();
                dispatcher.Setup(CancellationToken.None);
                while (dispatcher.Iterate(IterateBudget.Unlimited) == SaveProgress.More) { }
                dispatcher.CompleteIterables();
                dispatcher.WriteDeviceState();
                dispatcher.WriteEnd();
                f.Flush();
            }
            finally
            {
                dispatcher.Cleanup();
                if (live) Resume(before);
            }
            return new SnapshotManifest
            {
                Name = name, CreatedUtc = DateTimeOffset.UtcNow, Machine = vm.Machine, StreamBytes = f.Position, RamBytes = (long)vm.Memory.TotalBytes,
                VmClockNs = vm.Clock.NowNs, Checksum = channel.Finish(), RunState = before.ToWireName(),
            };
        }
    }

    /// <summary>
    /// Reads the file whole: checksum, framing, RAM records and block names, and every device's state into the device itself, whose present
    /// state is put back afterwards. BQL: held.
    /// </summary>
    private void Rehearse(SnapshotManifest manifest, Channels.FileChannel file, Action<long, long>? progress, CancellationToken cancel)
    {
        var saved = new MemoryStream();
        SaveDevices(saved);
        Exception? failure = null;
        Context.Ram.ValidateOnly = true;
        vm.SaveVm.IsValidating = true;
        try
        {
            ReadWhole(manifest, file, progress, cancel);
        }
#pragma warning disable CA1031 // Whatever went wrong, the devices' state is put back.
        catch (Exception e)
#pragma warning restore CA1031
        {
            failure = e;
        }
        finally
        {
            Context.Ram.ValidateOnly = false;
        }
        try
        {
            if (failure is null) return;
            saved.Position = 0;
            StateOverwrite.Run(vm, $"putting the devices' state back after snapshot '{manifest.Name}' could not be loaded ({failure.Message})", () =>
            {
                vm.ResetDevices();
                LoadDevices(saved);
            });
        }
        finally
        {
            vm.SaveVm.IsValidating = false;
        }
        System.Runtime.ExceptionServices.ExceptionDispatchInfo.Throw(failure);
    }

    /// <summary>Reads the file from its start to its end and compares the checksum; it may have changed since it was read last.</summary>
    private void ReadWhole(SnapshotManifest manifest, Channels.FileChannel file, Action<long, long>? progress, CancellationToken cancel)
    {
        file.Position = 0;
        using var channel = new HashingChannel(file, manifest.StreamBytes, progress, cancel);
        ReadStream(channel);
        Span<byte> waste = stackalloc byte[4096];
        while (channel.Read(waste) > 0) { }
        string checksum = channel.Finish();
        if (checksum == manifest.Checksum) return;
        throw new StreamFormatException($"snapshot '{manifest.Name}': checksum differs, {manifest.Checksum} in the manifest, {checksum} of the stream")
        {
            Expected = manifest.Checksum, Found = checksum,
        };
    }

    private void ReadStream(IMigrationChannel channel)
    {
        var f = new QemuFileReader(channel);
        Context.GlobalState.ClearReceived();
        Context.Ram.IgnoredOnLoad = Ram.IgnoredRam.None;
        var reader = new SectionReader(MachineView.Of(vm), f, Context.Compat, Context.Capabilities.IsOn(MigrationCapability.ValidateUuid));
        try
        {
            reader.ReadHeader();
            reader.LoadSetup();
            reader.ReadSections();
            reader.SkipVmDescription();
            Context.Ram.ThrowIfPagesMissing();
        }
        finally
        {
            reader.LoadCleanup();
        }
    }

    private void SaveDevices(MemoryStream into)
    {
        using var channel = new StreamChannel(into);
        using var f = new QemuFileWriter(channel);
        Context.GlobalState.Compat = Context.Compat;
        var dispatcher = new SaveDispatcher(MachineView.Of(vm), f, Context.Compat, sendUuid: false);
        // What iterables hold was not touched by the validation, so it need not be put back.
        dispatcher.WriteDeviceState(withIterables: false);
        dispatcher.WriteEnd();
        f.Flush();
    }

    private void LoadDevices(MemoryStream from)
    {
        using var channel = new StreamChannel(from);
        new SectionReader(MachineView.Of(vm), new QemuFileReader(channel), Context.Compat, validateUuid: false).ReadSections();
    }

    private void Resume(RunState before)
    {
        if (before == RunState.Running) vm.RunState.Start();
        else vm.RunState.Set(before);
        if (before == RunState.Suspended) vm.RunState.WasSuspended = false;
    }
}
