using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Core.Wire;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// A device's final state from data channels, in one attempt to load: puts the packets in order and writes them to the device on a thread of its own
/// (vfio-migration 3.7; QEMU: <c>vfio_load_bufs_thread</c>). Precopy data stay on the stream.
/// </summary>
internal sealed class VfioLoadThread : IDisposable
{
    private readonly VfioMigration _migration;
    private readonly IVfioThreadedLoad _session;
    private readonly Action<QemuFileReader> _readConfig;
    private readonly VfioStateBuffers _buffers;
    private readonly CancellationTokenRegistration _abort;
    private Task? _loader;
    private byte[] _config = [];

    /// <param name="migration">The device.</param>
    /// <param name="session">Takes the data.</param>
    /// <param name="readConfig">Reads the config record; called with the BQL held.</param>
    /// <param name="cancel">Ends all waits when the load is given up, also those for room in the queue.</param>
    internal VfioLoadThread(VfioMigration migration, IVfioThreadedLoad session, Action<QemuFileReader> readConfig, CancellationToken cancel)
    {
        (_migration, _session, _readConfig) = (migration, session, readConfig);
        _buffers = new VfioStateBuffers(migration.Io.Name, migration.Options.MaxQueuedBuffersBytes);
        _abort = cancel.Register(() => _buffers.Abort(new OperationCanceledException("the load was given up")));
    }

    /// <summary>Queues a packet and takes it over; waits while the queue is full. Any thread.</summary>
    internal void Insert(StateBuffer packet) => _buffers.Insert(packet);

    /// <summary>Starts to write packets to the device; called when the source has stopped its VM.</summary>
    internal void Start() => _loader ??= WorkerThread.Run($"vfio_load_{_migration.Id}", Load);

    /// <summary>Called when no more packets come; those that wait are still loaded.</summary>
    internal void EndInput() => _buffers.Abort(new StreamTruncatedException($"the channels ended before the last packet of device '{_migration.Id}'"));

    /// <summary>Waits until the device has everything, then reads the config record. BQL: not held.</summary>
    internal void Wait(CancellationToken cancel)
    {
        Start();
        using CancellationTokenRegistration abort = cancel.Register(() => _buffers.Abort(new OperationCanceledException("the load was given up")));
        _loader!.GetAwaiter().GetResult();
        // Not on the loader's thread, which must not wait for the BQL: its holder may be waiting for the loader.
        (InMemoryChannel from, InMemoryChannel to) = InMemoryChannel.CreatePair(VfioSave.MaxConfigBytes);
        using (from)
        using (to)
        {
            from.Write(_config);
            from.Shutdown(ChannelShutdown.Write);
            var f = new QemuFileReader(to) { Section = $"{_migration.Path}/vfio" };
            using (_migration.Services.Bql.Acquire()) _readConfig(f);
        }
    }

    /// <summary>Ends the thread, also when the load has not finished.</summary>
    public void Dispose()
    {
        _abort.Dispose();
        _buffers.Abort(new OperationCanceledException("the load has ended"));
        if (_loader is not null) Task.WhenAny(_loader).GetAwaiter().GetResult();
        _buffers.Dispose();
    }

    private void Load()
    {
        try
        {
            while (!_buffers.Take(LoadOne)) { }
        }
        catch (Exception e)
        {
            _buffers.Abort(e);
            throw;
        }
    }

    private void LoadOne(ReadOnlySpan<byte> data, bool isConfig)
    {
        if (!isConfig)
        {
            _session.LoadBytes(data);
            return;
        }
        if (data.Length > VfioSave.MaxConfigBytes)
            throw new StreamLimitException($"device '{_migration.Id}': config of {data.Length} bytes is over {VfioSave.MaxConfigBytes}");
        _config = data.ToArray();
    }
}
