using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Tests.Fakes;

/// <summary>
/// A v1 migration region (vfio-migration 5). The saving side stages chunks, the resuming side commits them. Mappable areas may cover the data
/// section in any order; a memfd backs them, which the region and the mappings share.
/// </summary>
internal sealed class FakeV1Region : IDisposable
{
    private readonly OwnedFd _memory;
    private readonly MappedRegion _own;
    private readonly ulong _dataOffset;
    private int _at;
    private int _staged;
    private int _chunk;
    private ulong _dataSize;

    public FakeV1Region(int dataBytes, uint dataOffset = 0x1000, params VfioRegionArea[] areas)
    {
        _dataOffset = dataOffset;
        ulong size = dataOffset + (ulong)dataBytes;
        ulong mapped = (size + 4095) & ~4095UL;
        _memory = Posix.MemFd("fake-v1");
        Posix.Truncate(_memory, (long)mapped);
        _own = MappedRegion.Map(_memory, mapped, shared: true, 0, "fake region");
        Info = new VfioRegionInfo
        {
            Index = 9, SizeBytes = size, Flags = VfioRegionFlags.Read | VfioRegionFlags.Write | (areas.Length > 0 ? VfioRegionFlags.Mmap : 0),
            Areas = areas, Type = VfioPciRegion.MigrationType, Subtype = VfioPciRegion.MigrationSubtype,
        };
    }

    public VfioRegionInfo Info { get; init; }

    /// <summary>All 32 bits of device_state.</summary>
    public uint State { get; set; } = 1;

    /// <summary>Every value that was written to device_state, in order.</summary>
    public List<uint> States { get; } = [];

    /// <summary>The state that the device gives out, <see cref="ChunkBytes"/> at a time.</summary>
    public byte[] Data { get; set; } = [];

    public int ChunkBytes { get; set; } = 1 << 16;

    /// <summary>Sizes of the first chunks; later chunks have <see cref="ChunkBytes"/>.</summary>
    public int[] ChunkSizes { get; set; } = [];

    /// <summary>The bytes of each commit, in order.</summary>
    public List<byte[]> Committed { get; } = [];

    /// <summary>Count of accesses to the data section that came by call instead of through a mapping.</summary>
    public int SlowAccesses { get; private set; }

    /// <summary>A write of this value to device_state fails and leaves the device in state 6 (error).</summary>
    public uint? BreakAt { get; set; }

    /// <summary>A write of this value to device_state fails and leaves the device in its state.</summary>
    public uint? RefuseAt { get; set; }

    /// <summary>Makes pending_bytes positive although every chunk has 0 bytes.</summary>
    public bool LiesAboutPending { get; set; }

    /// <summary>Answers each read of data_offset in place of the region; null for none.</summary>
    public Func<Errno>? Reading { get; set; }

    /// <summary>Replaces data_offset, as a hostile device might.</summary>
    public ulong? BadOffset { get; set; }

    /// <summary>Replaces data_size, as a hostile device might.</summary>
    public ulong? BadSize { get; set; }

    /// <summary>Starts from the first byte again, as a device in a new session does.</summary>
    public void Rewind() => (_at, _staged, _chunk) = (0, 0, 0);

    public void Reset()
    {
        Rewind();
        State = (State & ~7u) | 1;
    }

    public MappedRegion? Map(VfioRegionArea area) => Info.Areas.Contains(area)
        ? MappedRegion.Map(_memory, area.SizeBytes, shared: true, (long)area.OffsetBytes, "fake area")
        : null;

    public Errno Read(ulong offset, Span<byte> into)
    {
        if (offset >= _dataOffset)
        {
            SlowAccesses++;
            _own.Slice(offset, into.Length).CopyTo(into);
            return Errno.None;
        }
        ulong value;
        switch (offset, into.Length)
        {
            case (0, 4): BinaryPrimitives.WriteUInt32LittleEndian(into, State); return Errno.None;
            case (8, 8):
                // A read of pending_bytes tells the device that the reader has taken the staged chunk.
                (_at, _staged) = (_at + _staged, 0);
                value = LiesAboutPending ? 64 : (ulong)(Data.Length - _at);
                break;
            case (16, 8):
                if (Reading?.Invoke() is { } failed and not Errno.None) return failed;
                if ((State & 2) != 0) Stage();
                value = BadOffset ?? _dataOffset;
                break;
            case (24, 8): value = BadSize ?? (ulong)_staged; break;
            default: return Errno.EINVAL; // Registers accept their native width and alignment only.
        }
        BinaryPrimitives.WriteUInt64LittleEndian(into, value);
        return Errno.None;
    }

    public Errno Write(ulong offset, ReadOnlySpan<byte> from)
    {
        if (offset >= _dataOffset)
        {
            SlowAccesses++;
            from.CopyTo(_own.Slice(offset, from.Length));
            return Errno.None;
        }
        switch (offset, from.Length)
        {
            case (0, 4):
                uint state = BinaryPrimitives.ReadUInt32LittleEndian(from);
                if (state == RefuseAt) return Errno.EBUSY;
                if (state == BreakAt)
                {
                    State = 6;
                    return Errno.EIO;
                }
                if ((state & 2) != 0 && (State & 2) == 0) Rewind();
                State = state;
                States.Add(state);
                return Errno.None;
            case (24, 8):
                _dataSize = BinaryPrimitives.ReadUInt64LittleEndian(from);
                if (State != 4 && (State & 7) != 4) return Errno.EINVAL;
                Committed.Add(_own.Slice(_dataOffset, (int)_dataSize).ToArray());
                return Errno.None;
            default:
                return Errno.EINVAL;
        }
    }

    public void Dispose()
    {
        _own.Dispose();
        _memory.Dispose();
    }

    private void Stage()
    {
        (_at, _staged) = (_at + _staged, 0);
        if (LiesAboutPending) return;
        int chunk = _chunk < ChunkSizes.Length ? ChunkSizes[_chunk] : ChunkBytes;
        _chunk++;
        _staged = Math.Min(Math.Min(chunk, Data.Length - _at), (int)(Info.SizeBytes - _dataOffset));
        Data.AsSpan(_at, _staged).CopyTo(_own.Slice(_dataOffset, _staged));
    }
}
