using System.Diagnostics;
using System.Diagnostics.CodeAnalysis;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.Threading;

namespace Vmm.Tools.Bench;
using Nito.AsyncEx.Synchronous;

/// <summary>
/// A device that only copies memory and measures the time: by DMA, or, for comparison, from RAM of its own process.
/// <code>
/// 0x00 u64 ro identification   0x08 u64 rw memory address   0x10 u64 rw bytes   0x18 u64 rw bytes a piece
/// 0x20 u64 wo start: <see cref="Work"/>   0x28 u64 ro duration, ns; 0 until the end; all ones after an error
/// </code>
/// </summary>
internal sealed class CopyDevice : PciDevice, IVmDevice
{
    internal const ulong Identification = 0x79706f63, MemoryAddress = 0x08, Bytes = 0x10, Piece = 0x18, Start = 0x20, Elapsed = 0x28;

    /// <summary>Number of passes over the memory for one start; the reported time is that of one pass.</summary>
    private const ulong Passes = 16;

    internal enum Work : ulong
    {
        /// <summary>DMA into guest memory.</summary>
        ToMemory = 1,
        /// <summary>DMA out of guest memory.</summary>
        FromMemory = 2,
        /// <summary>The same pieces into shared memory of this process, by Span.CopyTo.</summary>
        PlainTo = 3,
        /// <summary>The same pieces out of that memory.</summary>
        PlainFrom = 4,
    }

    private readonly object _gate = new();
    private readonly RamBlock _own;
    private readonly GuestMemory _ownMemory = new();
    private readonly Task _worker;
    private ulong _address, _bytes, _piece = 64 << 10, _start, _elapsed;
    private bool _ends;

    internal CopyDevice(DeviceOptions options, IDeviceServices services) : base(services.Pci, new PciDeviceOptions { Id = options.Id })
    {
        _own = _ownMemory.AddBlock(new RamBlockOptions { Name = "own", SizeBytes = options.GetSizeBytes("own", 64 << 20), Prealloc = true });
        Config.SetUInt16(PciRegisters.VendorId, 0x1234);
        Config.SetUInt16(PciRegisters.DeviceId, 0x11ff);
        Config.SetUInt16(PciRegisters.ClassDevice, 0x00ff);
        RegisterBar(0, PciBarType.Memory32, 4096);
        _worker = WorkerThread.Run("copy", Run);
    }

    protected override ulong BarRead(int bar, ulong offset, int size) => offset switch
    {
        0 => Identification,
        MemoryAddress => _address,
        Bytes => _bytes,
        Piece => _piece,
        Elapsed => Volatile.Read(ref _elapsed),
        _ => 0,
    };

    protected override void BarWrite(int bar, ulong offset, int size, ulong value)
    {
        switch (offset)
        {
            case MemoryAddress: _address = value; break;
            case Bytes: _bytes = value; break;
            case Piece: _piece = Math.Clamp(value, 1, 16 << 20); break;
            case Start:
                lock (_gate)
                {
                    Volatile.Write(ref _elapsed, 0);
                    _start = value;
                    Monitor.PulseAll(_gate);
                }
                break;
        }
    }

    protected override void Dispose(bool disposing)
    {
        lock (_gate)
        {
            _ends = true;
            Monitor.PulseAll(_gate);
        }
        _worker.WaitAndUnwrapException();
        _ownMemory.Dispose();
        base.Dispose(disposing);
    }

    private void Run()
    {
        byte[] piece = new byte[16 << 20];
        Random.Shared.NextBytes(piece);
        while (true)
        {
            Work work;
            lock (_gate)
            {
                while (_start == 0 && !_ends) Monitor.Wait(_gate);
                if (_ends) return;
                (work, _start) = ((Work)_start, 0);
            }
            Volatile.Write(ref _elapsed, Measure(work, piece.AsSpan(0, (int)_piece)));
        }
    }

    private ulong Measure(Work work, Span<byte> piece)
    {
        long start = Stopwatch.GetTimestamp();
        for (ulong done = 0; done < _bytes * Passes; done += (uint)piece.Length)
        {
            ulong at = done % _bytes;
            Errno errno = Errno.None;
            switch (work)
            {
                case Work.ToMemory: errno = DmaWrite(_address + at, piece); break;
                case Work.FromMemory: errno = DmaRead(_address + at, piece); break;
                case Work.PlainTo: piece.CopyTo(_own.Slice(at, piece.Length)); break;
                case Work.PlainFrom: _own.ReadOnlySlice(at, piece.Length).CopyTo(piece); break;
            }
            if (errno != Errno.None) return ulong.MaxValue;
        }
        return (ulong)Math.Max(1, Stopwatch.GetElapsedTime(start).TotalNanoseconds / Passes);
    }
}

internal sealed class CopyDeviceFactory : IDeviceFactory
{
    public string TypeName => "copy";

    public string Summary => "Copies memory and measures the time";

    public IReadOnlyList<Core.VmStates.IVmStateDescription> Descriptions => [];

    [SuppressMessage("Reliability", "CA2000", Justification = "the caller owns the device")]
    public IVmDevice Create(DeviceOptions options, IDeviceServices services) => new CopyDevice(options, services);
}

internal sealed class CopyPlugin : IVmmPlugin
{
    public void Configure(VmmBuilder builder) => builder.AddDevice<CopyDeviceFactory>();
}
