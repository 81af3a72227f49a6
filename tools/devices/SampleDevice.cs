using System.Buffers.Binary;
using System.Diagnostics.CodeAnalysis;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Tools.Devices;
using Nito.AsyncEx.Synchronous;

/// <summary>
/// The device that libvfio-user's sample client expects (vfio-user 10.3). BAR0: a write of a UNIX time arms a timer, a read gives the
/// seconds since then. BAR1: 12 KiB of memory, two parts of which can be mapped. When the timer fires, the device raises INTx, writes 4 KiB to the second
/// range of guest memory through its descriptor, and writes 4 KiB to the first and reads them back by messages. The state is the raw bytes of BAR1 and
/// BAR0, as in the reference server.
/// </summary>
public sealed partial class SampleDevice : IVfioUserBackend
{
    private const uint Bar0 = 0, Bar1 = 1;
    private const int Bar0Bytes = 8, Bar1Bytes = 0x3000, TransferBytes = 4096, StateBytes = Bar1Bytes + Bar0Bytes;
    private const uint MemoryBar1Bytes = 0x4000;
    private const double LongestMs = 1e9;

    private readonly TimeProvider _time;
    private readonly VfioUserMemory _memory = new("sample", MemoryBar1Bytes);
    private readonly bool _hasMemoryBar1;
    private readonly VfioUserDmaGate _dmaGate = new();
    private VfioUserHost _host = null!;
    private VfioUserPciConfig _config = null!;

    private readonly object _gate = new();
    private readonly ITimer _timer;
    private Task _worker = Task.CompletedTask;
    private bool _ends, _isDue, _isStopped;
    private long _armedAt;

    [SuppressMessage("Reliability", "CA2000", Justification = "the timer is a field")]
    public SampleDevice(TimeProvider? time = null, bool hasMemoryBar1 = false, bool hasP2P = false)
    {
        _hasMemoryBar1 = hasMemoryBar1;
        MigrationFlags = VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy | (hasP2P ? VfioMigrationFlags.P2P : 0);
        _time = time ?? TimeProvider.System;
        _timer = _time.CreateTimer(_ => Fire(), null, Timeout.InfiniteTimeSpan, Timeout.InfiniteTimeSpan);
        Regions =
        [
            new VfioUserRegion { Index = Bar0, SizeBytes = Bar0Bytes },
            new VfioUserRegion { Index = Bar1, SizeBytes = hasMemoryBar1 ? MemoryBar1Bytes : Bar1Bytes, Memory = _memory, Areas = [new(0, 0x1000), new(0x2000, 0x1000)] },
            new VfioUserRegion { Index = VfioPciRegion.Config, SizeBytes = VfioUserPciConfig.Length },
        ];
    }

    public string TypeName => "sample";

    public IReadOnlyList<VfioUserRegion> Regions { get; }

    public VfioMigrationFlags MigrationFlags { get; }

    /// <summary>Number of transfers whose bytes differed when read back; not 0 only if the client's memory is broken.</summary>
    public int Mismatches { get; private set; }

    public uint GetIrqCount(uint index) => index == VfioPciIrq.Intx ? 1u : 0;

    public void Realize(VfioUserHost host)
    {
        ArgumentNullException.ThrowIfNull(host);
        _host = host;
        _config = new VfioUserPciConfig(host.Dma, 0xdead, 0xbeef, 0, hasIntx: true) { IntxLevel = () => host.Irqs.IsIntxAsserted };
        _config.SetSubsystem(0xcafe, 0xbabe);
        _config.AddIoBar((int)Bar0, Bar0Bytes);
        if (_hasMemoryBar1) _config.AddBar((int)Bar1, MemoryBar1Bytes);
        else _config.AddIoBar((int)Bar1, Bar1Bytes);
        // The sample client never touches the command register.
        host.Dma.IsBusMaster = true;
        _worker = WorkerThread.Run("sample", Work);
    }

    public void RegionRead(uint index, ulong offset, Span<byte> destination)
    {
        switch (index)
        {
            case Bar0:
                _host.Irqs.SetIntx(false);
                Span<byte> since = stackalloc byte[Bar0Bytes];
                lock (_gate) BinaryPrimitives.WriteInt64LittleEndian(since, _time.GetUtcNow().ToUnixTimeSeconds() - _armedAt);
                since.Slice((int)offset, destination.Length).CopyTo(destination);
                break;
            case Bar1:
                _memory.Slice(offset, destination.Length).CopyTo(destination);
                break;
            default:
                _config.Read(offset, destination);
                break;
        }
    }

    public void RegionWrite(uint index, ulong offset, ReadOnlySpan<byte> source)
    {
        switch (index)
        {
            case Bar0:
                _host.Irqs.SetIntx(false);
                lock (_gate) WriteTime((int)offset, source);
                break;
            case Bar1:
                source.CopyTo(_memory.Slice(offset, source.Length));
                _save?.MarkChanged();
                break;
            default:
                _config.Write(offset, source);
                _host.Dma.IsBusMaster = true;
                break;
        }
    }

    public ValueTask<Errno> Quiesce() => _dmaGate.Close();

    public void Unquiesce() => _dmaGate.Open();

    public ValueTask<Errno> Reset(VfioUserResetReason reason)
    {
        lock (_gate)
        {
            _timer.Change(Timeout.InfiniteTimeSpan, Timeout.InfiniteTimeSpan);
            (_armedAt, _isDue, _isStopped) = (0, false, false);
            _memory.Slice(0, Bar1Bytes).Clear();
            _config.Reset();
            _host.Irqs.ClearPending();
            _host.Dma.IsBusMaster = true;
        }
        return ValueTask.FromResult(Errno.None);
    }

    public void ClientLost()
    {
    }

    public void Dispose()
    {
        _timer.Dispose();
        _dmaGate.Dispose();
        lock (_gate)
        {
            _ends = true;
            Monitor.PulseAll(_gate);
        }
        _worker.WaitAndUnwrapException();
        _memory.Dispose();
    }

    /// <summary>CPUs write at most 4 bytes to ports: a write of the lower half clears the upper half, which a second write then sets.</summary>
    private void WriteTime(int offset, ReadOnlySpan<byte> source)
    {
        Span<byte> time = stackalloc byte[Bar0Bytes];
        BinaryPrimitives.WriteInt64LittleEndian(time, offset == 0 ? 0 : _armedAt);
        source.CopyTo(time[offset..]);
        Arm(BinaryPrimitives.ReadInt64LittleEndian(time));
    }

    private void Arm(long unixSeconds)
    {
        _armedAt = unixSeconds;
        // Timers drop what is less than a millisecond, and the guest must not see the interrupt before its time.
        double ms = Math.Ceiling(Left.TotalMilliseconds);
        _timer.Change(TimeSpan.FromMilliseconds(Math.Clamp(ms, 0, LongestMs)), Timeout.InfiniteTimeSpan);
    }

    /// <summary>Time until the armed time by the clock that the guest's reads compare with; negative if it has passed.</summary>
    private TimeSpan Left => DateTimeOffset.UnixEpoch.AddSeconds(Math.Clamp(_armedAt, 0, uint.MaxValue)) - _time.GetUtcNow();

    private void Fire()
    {
        lock (_gate)
        {
            // A stopped device must not act. The start arms the timer again, because the state has the time.
            if (_isStopped || _armedAt == 0) return;
            // The clock was set back meanwhile, or the time is farther away than one timer goes.
            if (Left > TimeSpan.Zero)
            {
                Arm(_armedAt);
                return;
            }
            _isDue = true;
            Monitor.PulseAll(_gate);
        }
    }

    private void Work()
    {
        while (true)
        {
            lock (_gate)
            {
                while (!_ends && !_isDue) Monitor.Wait(_gate);
                if (_ends) return;
                _isDue = false;
            }
            // The next access to BAR0 lowers it.
            _host.Irqs.SetIntx(true);
            if (!_dmaGate.Enter()) return;
            try
            {
                Transfer();
            }
            finally
            {
                _dmaGate.Exit();
            }
        }
    }

    private void Transfer()
    {
        IReadOnlyList<GuestRange> ranges = _host.Dma.Ranges;
        byte[] block = new byte[TransferBytes], back = new byte[TransferBytes];
        for (int i = 0; i < block.Length; i++) block[i] = (byte)('A' + (i / (TransferBytes / 4)));
        if (ranges.Count > 1) _host.Dma.Write(ranges[1].Start.Value, block);
        if (ranges.Count == 0 || _host.Dma.WriteByMessages(ranges[0].Start.Value, block) != Errno.None || _host.Dma.ReadByMessages(ranges[0].Start.Value, back) != Errno.None) return;
        if (!block.AsSpan().SequenceEqual(back)) Mismatches++;
    }
}

/// <summary><c>sample,bar1=ports|memory,p2p=on|off</c>: 12 KiB of ports, which the sample client needs, or 16 KiB of memory, which QEMU needs.</summary>
public sealed class SampleType : IVfioUserDeviceType
{
    public string TypeName => "sample";

    public string Summary => "A timer, a memory BAR and DMA, as libvfio-user's sample client expects";

    public IVfioUserBackend Create(DeviceOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        string bar1 = options.GetString("bar1", "ports");
        if (bar1 is not ("ports" or "memory")) throw new ConfigurationException($"device '{TypeName}': option 'bar1' expects ports or memory, found '{bar1}'");
        bool p2p = options.GetBool("p2p", false);
        options.ThrowIfUnused();
        return new SampleDevice(hasMemoryBar1: bar1 == "memory", hasP2P: p2p);
    }
}
