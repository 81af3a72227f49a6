using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Tests.Fakes;

/// <summary>
/// A programmable VFIO device: it has v2 states and data, or a v1 region (see <see cref="FakeV1Region"/>). A test can make any call fail by
/// its number. The device keeps its state in <see cref="State"/>; a load that the device accepts replaces it.
/// </summary>
internal sealed class FakeVfioDevice : IVfioDeviceIo, IVfioContainer
{
    private readonly Lock _gate = new();
    private FakeData? _session;
    private MemoryStream? _loading;
    private bool _logging;
    private int _calls;

    public FakeVfioDevice(string name = "fake", VfioMigrationFlags flags = VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P | VfioMigrationFlags.PreCopy)
    {
        Name = name;
        Flags = flags;
    }

    public string Name { get; }

    public VfioMigrationFlags Flags { get; }

    public VfioDeviceInfo Info => new(SupportsReset: true, IsPci: true, RegionCount: 10, IrqCount: 5);

    public IVfioContainer Container => SharedContainer ?? this;

    /// <summary>The container of another device; null when this device has its own.</summary>
    public IVfioContainer? SharedContainer { get; set; }

    public event Action<VmmException>? Lost;

    public VmmException? LostReason { get; private set; }

    /// <summary>The device's whole state. STOP_COPY gives it, after the chunks of PRE_COPY.</summary>
    public byte[] State { get; set; } = [];

    /// <summary>Replaces <see cref="State"/> as the source of the data in STOP_COPY.</summary>
    public ReadInto? ReadState { get; set; }

    /// <summary>Receives the loaded bytes in place of <see cref="State"/>.</summary>
    public WriteFrom? WriteState { get; set; }

    public delegate int ReadInto(Span<byte> into);

    public delegate void WriteFrom(ReadOnlySpan<byte> from);

    /// <summary>Chunks that PRE_COPY gives; a null entry makes one read fail with ENOMSG.</summary>
    public Queue<byte[]?> Precopy { get; } = new();

    /// <summary>Supplies further chunks when <see cref="Precopy"/> is empty, for a device whose precopy never ends.</summary>
    public Func<byte[]?>? EndlessPrecopy { get; set; }

    /// <summary>Longest read and write of data that the device does at once.</summary>
    public int MaxTransfer { get; set; } = int.MaxValue;

    /// <summary>Accepts or refuses the loaded bytes when the device goes from RESUMING to STOP.</summary>
    public Func<byte[], Errno> Accept { get; set; } = static _ => Errno.None;

    /// <summary>Answers VFIO_MIG_GET_PRECOPY_INFO; null means ENOTTY.</summary>
    public Func<VfioPrecopyInfo?> PrecopyInfo { get; set; } = static () => new VfioPrecopyInfo(0, 0);

    /// <summary>The answer to MIG_DATA_SIZE; null means the length of <see cref="State"/>.</summary>
    public ulong? DataSize { get; set; }

    public bool HasPrecopyInfoV2 { get; set; }

    public bool HasDmaLog { get; set; } = true;

    public bool CanLogDirty { get; set; } = true;

    public ulong MaxDirtyBitmapBytes { get; set; } = 1 << 28;

    /// <summary>DMA addresses of the pages that the device has written since the last report.</summary>
    public HashSet<ulong> Written { get; } = [];

    public ulong LogGranularityBytes { get; set; } = 4096;

    /// <summary>The migration region of a v1 device; null for a v2 device.</summary>
    public FakeV1Region? V1 { get; set; }

    /// <summary>The migration state that the device is in.</summary>
    public VfioDeviceState MigrationState { get; set; } = VfioDeviceState.Running;

    /// <summary>Every state that the device entered, intermediate states included.</summary>
    public List<VfioDeviceState> Transitions { get; } = [];

    /// <summary>The names of all calls that could have failed, in order.</summary>
    public List<string> Calls { get; } = [];

    /// <summary>How many of the calls so far have a name that ends so; also while the device is in use.</summary>
    public int Count(string ending)
    {
        lock (_gate) return Calls.Count(c => c.EndsWith(ending, StringComparison.Ordinal));
    }

    /// <summary>The number of the call to fail, from 0; -1 for none.</summary>
    public int FailAt { get; set; } = -1;

    /// <summary>The errno of the call that <see cref="FailAt"/> selects.</summary>
    public Errno FailWith { get; set; } = Errno.EIO;

    /// <summary>States that the device refuses to enter, once each.</summary>
    public Dictionary<VfioDeviceState, Errno> Refuse { get; } = [];

    /// <summary>Called before each step, so that a test can record the order of steps over several devices.</summary>
    public Action<FakeVfioDevice, VfioDeviceState>? Step { get; set; }

    public int Resets { get; private set; }

    public int OpenSessions { get; private set; }

    public bool IsLogging => _logging;

    public bool IsDisposed { get; private set; }

    public Errno ResetAnswer { get; set; } = Errno.None;

    /// <summary>Records and counts a call that can fail, and fails it when it is the call of <see cref="FailAt"/>.</summary>
    public Errno Point(string call)
    {
        lock (_gate)
        {
            Calls.Add(call);
            if (LostReason is not null) return Errno.ENODEV;
            return _calls++ == FailAt ? FailWith : Errno.None;
        }
    }

    public VfioRegionInfo GetRegionInfo(uint index) => V1 is { } v1 && index == v1.Info.Index ? v1.Info : new VfioRegionInfo { Index = index };

    public VfioIrqInfo GetIrqInfo(uint index) => default;

    public Errno SetIrqs(in VfioIrqSet request, ReadOnlySpan<byte> bools, ReadOnlySpan<OwnedFd?> eventFds) => Point("SetIrqs");

    public bool TakesUnmaskEventFd => true;

    public Errno DeviceFeature(VfioDeviceFeature feature, VfioFeatureOp op, Span<byte> data)
    {
        if (Point($"DeviceFeature {op} {feature}") is var failed and not Errno.None) return failed;
        if (V1 is not null) return Errno.ENOTTY;
        switch (feature)
        {
            case VfioDeviceFeature.Migration when op == VfioFeatureOp.Get:
                if (Flags == VfioMigrationFlags.None) return Errno.ENOTTY;
                BinaryPrimitives.WriteUInt64LittleEndian(data, (ulong)Flags);
                return Errno.None;
            case VfioDeviceFeature.MigDataSize when op == VfioFeatureOp.Get:
                BinaryPrimitives.WriteUInt64LittleEndian(data, DataSize ?? (ulong)State.Length);
                return DataSize == ulong.MaxValue ? Errno.ENOTTY : Errno.None;
            case VfioDeviceFeature.MigPrecopyInfoV2 when op == VfioFeatureOp.Set:
                return HasPrecopyInfoV2 ? Errno.None : Errno.ENOTTY;
            case VfioDeviceFeature.DmaLoggingStart when (op & VfioFeatureOp.Probe) != 0:
                return HasDmaLog ? Errno.None : Errno.ENOTTY;
            default:
                return Errno.ENOTTY;
        }
    }

    public Errno GetMigrationState(out VfioDeviceState state)
    {
        state = MigrationState;
        return Point("GetMigrationState");
    }

    public Errno SetMigrationState(VfioDeviceState state, out IVfioMigrationData? data)
    {
        data = null;
        if (Point($"SetMigrationState {state}") is var failed and not Errno.None) return failed;
        if (VfioStateArcs.Path(MigrationState, state, Flags) is not { } path) return Errno.EINVAL;
        foreach (VfioDeviceState next in path)
        {
            Step?.Invoke(this, next);
            if (Refuse.Remove(next, out Errno refusal)) return refusal;
            if (MigrationState == VfioDeviceState.Resuming && Finish() is var verdict and not Errno.None) return verdict;
            if (VfioStateArcs.OpensData(MigrationState, next)) data = Open(next);
            else if (!VfioStateArcs.HasData(next)) _session = null;
            MigrationState = next;
            Transitions.Add(next);
        }
        return Errno.None;
    }

    public Errno StartDmaLog(ulong pageSizeBytes, IReadOnlyList<GuestRange> ranges, out ulong inForceBytes)
    {
        inForceBytes = LogGranularityBytes;
        Errno errno = Point("StartDmaLog");
        _logging = errno == Errno.None;
        return errno;
    }

    public Errno StopDmaLog()
    {
        _logging = false;
        return Point("StopDmaLog");
    }

    public Errno ReportDmaLog(GuestRange range, ulong pageSizeBytes, Span<ulong> bitmap)
    {
        if (Point("ReportDmaLog") is var failed and not Errno.None) return failed;
        if (!_logging) return Errno.EINVAL;
        lock (Written)
        {
            foreach (ulong address in Written.Where(a => range.Contains(new GuestAddress(a))).ToArray())
            {
                ulong page = (address - range.Start.Value) / pageSizeBytes;
                bitmap[(int)(page / 64)] |= 1UL << (int)(page % 64);
                Written.Remove(address);
            }
        }
        return Errno.None;
    }

    public Errno Reset()
    {
        if (Point("Reset") is var failed and not Errno.None) return failed;
        if (ResetAnswer != Errno.None) return ResetAnswer;
        Resets++;
        (_session, _loading) = (null, null);
        MigrationState = VfioDeviceState.Running;
        Transitions.Add(VfioDeviceState.Running);
        V1?.Reset();
        return Errno.None;
    }

    public Errno RegionRead(uint index, ulong offset, Span<byte> destination)
    {
        if (Point($"RegionRead 0x{offset:x}") is var failed and not Errno.None) return failed;
        return V1 is { } v1 && index == v1.Info.Index ? v1.Read(offset, destination) : Errno.EINVAL;
    }

    public Errno RegionWrite(uint index, ulong offset, ReadOnlySpan<byte> source, bool posted = false)
    {
        if (Point($"RegionWrite 0x{offset:x}") is var failed and not Errno.None) return failed;
        return V1 is { } v1 && index == v1.Info.Index ? v1.Write(offset, source) : Errno.EINVAL;
    }

    public MappedRegion? MapArea(uint index, VfioRegionArea area) => V1?.Map(area);

    public void SetBusMaster(bool enabled)
    {
    }

    public void SectionAdded(GuestMemorySection section)
    {
    }

    public void SectionRemoved(GuestMemorySection section)
    {
    }

    public Errno StartDirtyLog() => Start("StartDirtyLog");

    public Errno StopDirtyLog()
    {
        _logging = false;
        return Point("StopDirtyLog");
    }

    public Errno GetDirtyBitmap(GuestRange range, Span<ulong> bitmap) => ReportDmaLog(range, 4096, bitmap);

    /// <summary>Makes the device go away, as when its vfio-user server dies: every call fails from now on.</summary>
    public void Lose(VmmException reason)
    {
        LostReason = reason;
        Lost?.Invoke(reason);
    }

    public void Dispose()
    {
        IsDisposed = true;
        V1?.Dispose();
    }

    private Errno Start(string call)
    {
        Errno errno = Point(call);
        _logging = errno == Errno.None;
        return errno;
    }

    private Errno Finish()
    {
        byte[] loaded = _loading!.ToArray();
        Errno errno = Accept(loaded);
        if (errno != Errno.None) return errno;
        State = loaded;
        _loading = null;
        return Errno.None;
    }

    private FakeData Open(VfioDeviceState state)
    {
        if (state == VfioDeviceState.Resuming) _loading = new MemoryStream();
        OpenSessions++;
        return _session = new FakeData(this, isLoading: state == VfioDeviceState.Resuming);
    }

    /// <summary>The data of one session. After the session's end it answers ENODEV, as the kernel's data descriptor does.</summary>
    private sealed class FakeData(FakeVfioDevice device, bool isLoading) : IVfioMigrationData
    {
        private byte[]? _rest;
        private int _at;
        private bool _disposed;

        public int Read(Span<byte> destination, out Errno errno)
        {
            errno = Errno.ENODEV;
            if (_disposed || !ReferenceEquals(device._session, this)) return -1;
            errno = isLoading ? Errno.EBADF : device.Point("Data.Read");
            if (errno != Errno.None) return -1;
            if (device.MigrationState != VfioDeviceState.StopCopy) return ReadPrecopy(destination, out errno);
            if (device.ReadState is { } read) return read(destination);
            _rest ??= device.State;
            int n = Math.Min(Math.Min(destination.Length, device.MaxTransfer), _rest.Length - _at);
            _rest.AsSpan(_at, n).CopyTo(destination);
            _at += n;
            return n;
        }

        public int Write(ReadOnlySpan<byte> source, out Errno errno)
        {
            errno = Errno.ENODEV;
            if (_disposed || !ReferenceEquals(device._session, this)) return -1;
            errno = isLoading ? device.Point("Data.Write") : Errno.EBADF;
            if (errno != Errno.None) return -1;
            int n = Math.Min(source.Length, device.MaxTransfer);
            if (device.WriteState is { } write) write(source[..n]);
            else device._loading!.Write(source[..n]);
            return n;
        }

        public Errno PrecopyInfo(out VfioPrecopyInfo info)
        {
            info = default;
            if (device.Point("Data.PrecopyInfo") is var failed and not Errno.None) return failed;
            if (isLoading) return Errno.ENOTTY;
            if (!ReferenceEquals(device._session, this)) return Errno.ENODEV;
            if (!VfioStateArcs.IsPrecopy(device.MigrationState)) return Errno.EINVAL;
            if (device.PrecopyInfo() is not { } known) return Errno.ENOTTY;
            info = known;
            return Errno.None;
        }

        public void Dispose()
        {
            if (!_disposed) device.OpenSessions--;
            _disposed = true;
        }

        private int ReadPrecopy(Span<byte> destination, out Errno errno)
        {
            errno = Errno.None;
            byte[]? chunk;
            if (!device.Precopy.TryDequeue(out chunk))
            {
                if (device.EndlessPrecopy is null) return 0;
                chunk = device.EndlessPrecopy();
            }
            if (chunk is null)
            {
                errno = Errno.ENOMSG;
                return -1;
            }
            chunk.CopyTo(destination);
            return chunk.Length;
        }
    }
}
