using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Tests.Fakes;

/// <summary>
/// A PCI device behind <see cref="IVfioDeviceIo"/>: its config space has writable header registers, its BARs are plain memory, and a test
/// fires its interrupts. It cannot migrate. It records requests in order, as the text that tests compare.
/// </summary>
internal sealed class FakeVfioIo : IVfioDeviceIo
{
    private readonly Dictionary<uint, VfioRegionInfo> _regions = [];
    private readonly Dictionary<uint, byte[]> _memory = [];
    private readonly Dictionary<(uint Index, uint Vector), OwnedFd?> _bound = [];
    private readonly Dictionary<uint, VfioIrqInfo> _irqs = new()
    {
        [VfioPciIrq.Intx] = new(VfioIrqInfoFlags.EventFd | VfioIrqInfoFlags.Maskable | VfioIrqInfoFlags.AutoMasked, 1),
        [VfioPciIrq.Err] = new(VfioIrqInfoFlags.EventFd, 1),
        [VfioPciIrq.Req] = new(VfioIrqInfoFlags.EventFd, 1),
    };

    private readonly Dictionary<(uint, ulong), OwnedFd> _areas = [];
    private byte[]? _configAtReset;

    /// <summary>Creates a device with ids 1af4:0001 and pin A; the default config space has the size of PCI Express.</summary>
    internal FakeVfioIo(int configBytes = 4096)
    {
        Config = new byte[configBytes];
        Set(0, 4, 0x0001_1af4);
        Set(8, 4, 0x0700_0210);
        Set(0x2c, 4, 0x0002_1af4);
        Config[0x3d] = 1;
        _regions[VfioPciRegion.Config] = Region(VfioPciRegion.Config, (ulong)configBytes);
    }

    public string Name => "fake";

    public VfioDeviceInfo Info { get; set; } = new(SupportsReset: true, IsPci: true, RegionCount: 9, IrqCount: 5);

    public IVfioContainer Container => throw new NotSupportedException("the fake has no DMA");

    public event Action<VmmException>? Lost;

    public VmmException? LostReason { get; private set; }

    internal byte[] Config { get; }

    /// <summary>Size of the ROM. With 0 there is none, and its register reads as zero.</summary>
    internal uint RomBytes { get; init; }

    /// <summary>SET_IRQS requests, e.g. <c>2 bind 0+3 f-f</c>: f stands for an eventfd, - for none.</summary>
    internal List<string> IrqLog { get; } = [];

    /// <summary>Region writes, e.g. <c>7+04=0007</c>; posted ones end in p.</summary>
    internal List<string> WriteLog { get; } = [];

    internal List<bool> BusMaster { get; } = [];

    internal int RegionReads { get; private set; }

    internal int Resets { get; private set; }

    internal bool IsDisposed { get; private set; }

    /// <summary>The result of every request.</summary>
    internal Errno Answer { get; set; }

    public bool TakesUnmaskEventFd { get; init; } = true;

    /// <summary>The result of SET_IRQS.</summary>
    internal Errno IrqAnswer { get; set; }

    /// <summary>The result when an eventfd is bound to unmask the pin. EBUSY ends when an eventfd is unbound.</summary>
    internal Errno UnmaskEventFdAnswer { get; set; }

    internal FakeVfioIo Set(int offset, int size, uint value)
    {
        for (int i = 0; i < size; i++) Config[offset + i] = (byte)(value >> (8 * i));
        return this;
    }

    /// <summary>Adds a capability at the end of the chain.</summary>
    internal FakeVfioIo Capability(int offset, params byte[] bytes)
    {
        int pointer = 0x34;
        while (Config[pointer] != 0) pointer = Config[pointer] + 1;
        Config[pointer] = (byte)offset;
        bytes.CopyTo(Config, offset);
        Config[offset + 1] = 0;
        Config[6] |= 0x10;
        return this;
    }

    internal FakeVfioIo Bar(int number, ulong size, uint typeBits, params VfioRegionArea[] areas)
    {
        Set(0x10 + 4 * number, 4, typeBits);
        _regions[(uint)number] = Region((uint)number, size) with { Areas = areas };
        _memory[(uint)number] = new byte[size];
        foreach (VfioRegionArea area in areas)
        {
            OwnedFd fd = Posix.MemFd("fake-bar");
            Posix.Truncate(fd, (long)area.SizeBytes);
            _areas[((uint)number, area.OffsetBytes)] = fd;
        }
        return this;
    }

    internal FakeVfioIo Irq(uint index, uint count, VfioIrqInfoFlags flags = VfioIrqInfoFlags.EventFd)
    {
        _irqs[index] = new VfioIrqInfo(flags, count);
        return this;
    }

    /// <summary>Adds a BAR that exceeds every limit.</summary>
    internal FakeVfioIo HugeBar(int number)
    {
        _regions[(uint)number] = Region((uint)number, (1UL << 63) + 1);
        return this;
    }

    internal FakeVfioIo MsixMappable(int bar)
    {
        _regions[(uint)bar] = _regions[(uint)bar] with { IsMsixMappable = true };
        return this;
    }

    /// <summary>The content of a BAR outside its mappable areas.</summary>
    internal byte[] Memory(int bar) => _memory[(uint)bar];

    /// <summary>The areas that were mapped, in order.</summary>
    internal List<(uint Region, VfioRegionArea Area)> Mapped { get; } = [];

    /// <summary>Fires an interrupt, as a device does.</summary>
    internal void Fire(uint index, uint vector = 0) =>
        Posix.SignalEventFd(Bound(index, vector));

    /// <summary>The eventfd that is bound to an interrupt.</summary>
    internal OwnedFd Bound(uint index, uint vector) =>
        _bound.GetValueOrDefault((index, vector)) ?? throw new InvalidOperationException($"interrupt {index}.{vector} is not bound");

    /// <summary>The eventfd that unmasks the pin; null when none is bound.</summary>
    internal OwnedFd? UnmaskFd { get; private set; }

    internal void Lose()
    {
        LostReason = new VfioException("the server went away", Errno.ENOTCONN);
        Lost?.Invoke(LostReason);
    }

    public VfioRegionInfo GetRegionInfo(uint index) =>
        index == VfioPciRegion.Rom && RomBytes > 0 ? Region(index, RomBytes) : _regions.GetValueOrDefault(index) ?? new VfioRegionInfo { Index = index };

    public VfioIrqInfo GetIrqInfo(uint index) => _irqs.GetValueOrDefault(index);

    public Errno SetIrqs(in VfioIrqSet request, ReadOnlySpan<byte> bools, ReadOnlySpan<OwnedFd?> eventFds)
    {
        string fds = "";
        foreach (OwnedFd? fd in eventFds) fds += fd is null ? '-' : 'f';
        string what = (request.Flags & (VfioIrqSetFlags.ActionMask | VfioIrqSetFlags.ActionUnmask | VfioIrqSetFlags.ActionTrigger)) switch
        {
            VfioIrqSetFlags.ActionMask => "mask",
            VfioIrqSetFlags.ActionUnmask => "unmask",
            _ when (request.Flags & VfioIrqSetFlags.DataEventFd) != 0 => "bind",
            _ => "disable",
        };
        IrqLog.Add(what == "disable" ? $"{request.Index} {what}" : $"{request.Index} {what} {request.Start}+{request.Count} {fds}".TrimEnd());
        if (Answer != Errno.None || IrqAnswer != Errno.None) return Answer != Errno.None ? Answer : IrqAnswer;
        if (what == "unmask" && eventFds.Length > 0)
        {
            if (eventFds[0] is null && UnmaskEventFdAnswer == Errno.EBUSY) UnmaskEventFdAnswer = Errno.None;
            if (UnmaskEventFdAnswer == Errno.None) UnmaskFd = eventFds[0];
            return UnmaskEventFdAnswer;
        }
        if (what == "disable")
            foreach ((uint, uint) key in _bound.Keys.Where(k => k.Index == RequestIndex(IrqLog[^1])).ToList()) _bound.Remove(key);
        for (int i = 0; i < eventFds.Length; i++) _bound[(request.Index, request.Start + (uint)i)] = eventFds[i];
        return Errno.None;
    }

    public Errno RegionRead(uint index, ulong offset, Span<byte> destination)
    {
        RegionReads++;
        if (Answer != Errno.None) return Answer;
        if (index == VfioPciRegion.Rom)
        {
            for (int i = 0; i < destination.Length; i++) destination[i] = (byte)(offset + (ulong)i);
            return Errno.None;
        }
        byte[] from = index == VfioPciRegion.Config ? Config : _memory[index];
        if (offset + (ulong)destination.Length > (ulong)from.Length) return Errno.EINVAL;
        from.AsSpan((int)offset, destination.Length).CopyTo(destination);
        return Errno.None;
    }

    public Errno RegionWrite(uint index, ulong offset, ReadOnlySpan<byte> source, bool posted = false)
    {
        byte[] reversed = source.ToArray();
        Array.Reverse(reversed);
        WriteLog.Add($"{index}+{offset:x2}={Convert.ToHexStringLower(reversed)}{(posted ? "p" : "")}");
        if (Answer != Errno.None) return Answer;
        if (index == VfioPciRegion.Config) WriteConfig((int)offset, source);
        else source.CopyTo(_memory[index].AsSpan((int)offset));
        return Errno.None;
    }

    public MappedRegion? MapArea(uint index, VfioRegionArea area)
    {
        Mapped.Add((index, area));
        // A mapping of a part of an area shows that part of the area's memory.
        VfioRegionArea whole = GetRegionInfo(index).Areas.Single(a => area.OffsetBytes >= a.OffsetBytes && area.End <= a.End);
        return MappedRegion.Map(_areas[(index, whole.OffsetBytes)], area.SizeBytes, shared: true, (long)(area.OffsetBytes - whole.OffsetBytes), "fake");
    }

    /// <summary>Maps the memory of an area once more, for the test.</summary>
    internal MappedRegion View(int bar, ulong areaOffset, ulong size) => MappedRegion.Map(_areas[((uint)bar, areaOffset)], size, shared: true, 0, "view");

    public void SetBusMaster(bool enabled) => BusMaster.Add(enabled);

    public Errno Reset()
    {
        Resets++;
        if (Answer != Errno.None) return Answer;
        _configAtReset?.CopyTo(Config, 0);
        return Errno.None;
    }

    /// <summary>Makes the present content of config space the power-on state.</summary>
    internal FakeVfioIo PoweredOn()
    {
        _configAtReset = [.. Config];
        return this;
    }

    public Errno DeviceFeature(VfioDeviceFeature feature, VfioFeatureOp op, Span<byte> data) => Errno.ENOTTY;

    public Errno GetMigrationState(out VfioDeviceState state)
    {
        state = VfioDeviceState.Running;
        return Errno.ENOTTY;
    }

    public Errno SetMigrationState(VfioDeviceState state, out IVfioMigrationData? data)
    {
        data = null;
        return Errno.ENOTTY;
    }

    public Errno StartDmaLog(ulong pageSizeBytes, IReadOnlyList<GuestRange> ranges, out ulong inForceBytes)
    {
        inForceBytes = 0;
        return Errno.ENOTTY;
    }

    public Errno StopDmaLog() => Errno.ENOTTY;

    public Errno ReportDmaLog(GuestRange range, ulong pageSizeBytes, Span<ulong> bitmap) => Errno.ENOTTY;

    public void Dispose()
    {
        IsDisposed = true;
        foreach (OwnedFd fd in _areas.Values) fd.Dispose();
    }

    private static uint RequestIndex(string logged) => uint.Parse(logged.Split(' ')[0]);

    private static VfioRegionInfo Region(uint index, ulong size) => new() { Index = index, SizeBytes = size, Flags = VfioRegionFlags.Read | VfioRegionFlags.Write };

    /// <summary>Identity and BAR types are read-only; the ROM register stores its address bits and its enable bit only.</summary>
    private void WriteConfig(int offset, ReadOnlySpan<byte> source)
    {
        if (offset == 0x30)
        {
            uint value = BitConverter.ToUInt32(source) & (RomBytes == 0 ? 0 : ~(RomBytes - 1) | 1);
            Set(0x30, 4, value);
            return;
        }
        for (int i = 0; i < source.Length; i++)
            if (offset + i is (>= 4 and < 6) or 0xc or 0x3c or >= 0x40) Config[offset + i] = source[i];
    }
}
