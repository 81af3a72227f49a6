using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Core.Wire;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// A device's final state over data channels: a save thread that numbers its buffers, and a load thread that puts them in order (spec
/// vfio-migration 3.7; QEMU: <c>hw/vfio/migration-multifd.c</c>). Precopy data stay on the main channel.
/// </summary>
/// <param name="section">The device's section.</param>
/// <param name="migration">The device.</param>
internal sealed class VfioMultifd(VfioSection section, VfioMigration migration) : IDisposable
{
    /// <summary>Longest config record: a PCI express function's, with a full MSI-X table.</summary>
    private const int MaxConfigBytes = 1 << 17;

    private VfioStateBuffers? _buffers;
    private Task? _loader;
    private byte[] _config = [];

    private IVfioMigrationProtocol Protocol => migration.Protocol!;

    internal void Save(IDeviceStateSink sink, CancellationToken cancel)
    {
        byte[] packet = GC.AllocateUninitializedArray<byte>(VfioStatePacket.HeaderBytes + VfioMigrationV2.MaxBufferBytes);
        uint index = 0;
        void Send(ReadOnlySpan<byte> data, uint flags)
        {
            cancel.ThrowIfCancellationRequested();
            VfioStatePacket.WriteHeader(packet, index++, flags);
            data.CopyTo(packet.AsSpan(VfioStatePacket.HeaderBytes));
            sink.Send(packet.AsSpan(0, VfioStatePacket.HeaderBytes + data.Length));
        }
        Protocol.SaveCompleteTo(data => Send(data, 0));
        Send(Config(), VfioStatePacket.ConfigState);
    }

    /// <summary>Begins to take packets.</summary>
    internal void BeginLoad() => _buffers = new VfioStateBuffers(migration.Io.Name, migration.Options.MaxQueuedBuffersBytes);

    internal void Insert(ReadOnlySpan<byte> packet)
    {
        VfioStateBuffers buffers = _buffers ?? throw new DeviceStateException($"device '{migration.Id}': a state packet came, but the device's state was to come on the main channel");
        buffers.Insert(packet);
    }

    /// <summary>Starts to write packets to the device; the VM of the source stands still from now on.</summary>
    internal void Start()
    {
        if (_buffers is not { } buffers || _loader is not null) return;
        _loader = WorkerThread.Run($"vfio_load_{migration.Id}", () => Load(buffers));
    }

    /// <summary>Nothing comes any more; what waits is still loaded.</summary>
    internal void EndInput() => _buffers?.Abort(new StreamTruncatedException($"the channels ended before the last packet of device '{migration.Id}'"));

    internal void Wait(CancellationToken cancel)
    {
        if (_buffers is null) return;
        Start();
        using CancellationTokenRegistration abort = cancel.Register(() => _buffers.Abort(new OperationCanceledException("the load was given up")));
        _loader!.GetAwaiter().GetResult();
        // Not on the loader: it must never wait for the BQL, whose holder may be waiting for it.
        (InMemoryChannel from, InMemoryChannel to) = InMemoryChannel.CreatePair(MaxConfigBytes);
        using (from)
        using (to)
        {
            from.Write(_config);
            from.Shutdown(ChannelShutdown.Write);
            var f = new QemuFileReader(to) { Section = $"{migration.Path}/vfio" };
            using (migration.Services.Bql.Acquire()) section.ReadConfig(f);
        }
    }

    public void Dispose() => EndLoad();

    internal void EndLoad()
    {
        if (_buffers is null) return;
        _buffers.Abort(new OperationCanceledException("the load has ended"));
        if (_loader is not null) Task.WhenAny(_loader).GetAwaiter().GetResult();
        _buffers.Dispose();
        (_buffers, _loader) = (null, null);
    }

    private byte[] Config()
    {
        (InMemoryChannel from, InMemoryChannel to) = InMemoryChannel.CreatePair(MaxConfigBytes);
        using (from)
        using (to)
        using (var f = new QemuFileWriter(from))
        {
            section.WriteConfig(f);
            f.Flush();
            byte[] config = new byte[f.Position];
            new QemuFileReader(to).Read(config);
            return config;
        }
    }

    private void Load(VfioStateBuffers buffers)
    {
        try
        {
            while (!buffers.Take(LoadOne)) { }
        }
        catch (Exception e)
        {
            buffers.Abort(e);
            throw;
        }
    }

    private void LoadOne(ReadOnlySpan<byte> data, bool isConfig)
    {
        if (!isConfig)
        {
            Protocol.LoadBytes(data);
            return;
        }
        if (data.Length > MaxConfigBytes) throw new StreamLimitException($"device '{migration.Id}': config of {data.Length} bytes is over {MaxConfigBytes}");
        _config = data.ToArray();
    }
}
