using System.Buffers.Binary;
using System.Diagnostics;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.Threading;
using Vmm.Core.VmStates;

namespace Vmm.Core.Workloads;
using Nito.AsyncEx.Synchronous;

/// <summary>
/// A guest that measures its own pauses, for machines without a CPU. While the VM runs, about once a millisecond it reads the host's monotonic clock
/// and writes into guest RAM the time of its last tick, the longest time between two ticks, and their number. The measure is valid across any number of
/// processes on one host. Block layout, little-endian: u64 last tick ns, u64 longest gap ns, u64 ticks, u64 starts of the VM after a tick, u64 gap that
/// the last such start ended, ns.
/// </summary>
internal sealed class TickerDevice : IVmDevice, IVmStateHandler
{
    /// <summary>Offset of the number of starts after a stop.</summary>
    public const int StopsOffset = 24;

    /// <summary>Offset of the gap that contains the last stop, ns.</summary>
    public const int StopGapOffset = 32;

    private const int PeriodMs = 1, BlockBytes = 40;
    private readonly RamBlock _block;
    private readonly IDisposable _handler;
    private readonly ManualResetEvent _end = new(false), _go = new(false);
    private readonly Task _thread;
    private readonly Lock _gate = new();
    private bool _running, _wasStopped;

    /// <summary>Makes the ticker and starts its thread. BQL: held.</summary>
    /// <param name="options">Reads the option <c>block</c>: the RAM block for the results, which nothing else may use.</param>
    /// <param name="services">Services of the device's VM.</param>
    /// <exception cref="ConfigurationException">The VM has no such block, or the block is too small.</exception>
    public TickerDevice(DeviceOptions options, IDeviceServices services)
    {
        ArgumentNullException.ThrowIfNull(options);
        ArgumentNullException.ThrowIfNull(services);
        Id = options.Id;
        string name = options.GetString("block", "ticks");
        _block = services.Memory.FindBlock(name) ?? throw new ConfigurationException($"device 'ticker': option 'block': no RAM block '{name}'");
        if (_block.SizeBytes < BlockBytes) throw new ConfigurationException($"device 'ticker': RAM block '{name}' has {_block.SizeBytes} bytes, {BlockBytes} are needed");
        _handler = services.RunState.Register(this);
        if (services.RunState.State == RunState.Running) SetRunning(true);
        _thread = WorkerThread.Run($"ticker/{Id}", Run);
    }

    /// <inheritdoc/>
    public string Id { get; }

    /// <inheritdoc/>
    public void OnVmStateChange(bool running, RunState state) => SetRunning(running);

    /// <inheritdoc/>
    public void Reset()
    {
        // The ticker's state is in RAM, which a reset does not change.
    }

    /// <summary>Ends the thread and removes all registrations. BQL: held.</summary>
    public void Dispose()
    {
        _handler.Dispose();
        _end.Set();
        _go.Set();
        _thread.WaitAndUnwrapException();
        _end.Dispose();
        _go.Dispose();
    }

    private void SetRunning(bool running)
    {
        lock (_gate)
        {
            _wasStopped |= running && !_running;
            _running = running;
        }
        if (running) _go.Set();
        else _go.Reset();
    }

    private void Run()
    {
        while (!_end.WaitOne(PeriodMs))
        {
            _go.WaitOne();
            lock (_gate)
            {
                if (_running) Tick();
            }
        }
    }

    private void Tick()
    {
        Span<byte> at = _block.Slice(0, BlockBytes);
        long now = MonotonicClock.NowNs;
        long last = BinaryPrimitives.ReadInt64LittleEndian(at), longest = BinaryPrimitives.ReadInt64LittleEndian(at[8..]);
        if (last != 0 && now - last > longest) BinaryPrimitives.WriteInt64LittleEndian(at[8..], now - last);
        if (_wasStopped && last != 0)
        {
            BinaryPrimitives.WriteInt64LittleEndian(at[StopGapOffset..], now - last);
            BinaryPrimitives.WriteInt64LittleEndian(at[StopsOffset..], BinaryPrimitives.ReadInt64LittleEndian(at[StopsOffset..]) + 1);
        }
        _wasStopped = false;
        BinaryPrimitives.WriteInt64LittleEndian(at, now);
        BinaryPrimitives.WriteInt64LittleEndian(at[16..], BinaryPrimitives.ReadInt64LittleEndian(at[16..]) + 1);
        _block.MarkDirty(0, BlockBytes);
    }
}

/// <summary>Makes <see cref="TickerDevice"/>s.</summary>
internal sealed class TickerDeviceFactory : IDeviceFactory
{
    /// <inheritdoc/>
    public string TypeName => "ticker";

    /// <inheritdoc/>
    public string Summary => "a guest that ticks every millisecond and remembers its longest pause; block=NAME";

    /// <inheritdoc/>
    public IReadOnlyList<IVmStateDescription> Descriptions => [];

    /// <inheritdoc/>
    public IVmDevice Create(DeviceOptions options, IDeviceServices services) => new TickerDevice(options, services);
}
