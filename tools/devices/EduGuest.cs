using System.Buffers.Binary;
using System.Diagnostics;
using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Core.VmStates;

namespace Vmm.Tools.Devices;

/// <summary>
/// Drives an <c>edu</c> function as a guest does, but without a CPU: lets the device read a page and write it back by DMA, compares the pages, and starts
/// again with other bytes. The interrupt of each step starts the next one, so a lost interrupt ends the loop. All its state is in a block of guest RAM,
/// little-endian: u64 steps done (0: not begun), u64 wrong pages, u64 time of the last step ns, u64 longest time between steps ns, u64 1 if an interrupt
/// came while the VM was stopped. The device reads page 1 and writes page 2.
/// </summary>
public sealed class EduGuest : IVmDevice, IVmStateHandler, IInterruptController
{
    private const ulong BarAddress = 0xe000_0000, MsiAddress = 0xfee0_0000;
    private const uint MsiData = 0x41;
    private const int Page = (int)RamBlock.PageSize;
    private const ulong Run = 1, ToMemory = 2, Interrupt = 4;

    private readonly PciHost _pci;
    private readonly RamBlock _block;
    private readonly IDisposable _handler, _interrupts;
    private readonly byte[] _zeros = new byte[48];
    private readonly int _bytes;
    private bool _running;

    public EduGuest(DeviceOptions options, IDeviceServices services)
    {
        ArgumentNullException.ThrowIfNull(options);
        ArgumentNullException.ThrowIfNull(services);
        Id = options.Id;
        string name = options.GetString("block", "edu");
        _block = services.Memory.FindBlock(name) ?? throw new ConfigurationException($"device 'edu-guest': option 'block': no RAM block '{name}'");
        if (_block.SizeBytes < 3 * Page) throw new ConfigurationException($"device 'edu-guest': RAM block '{name}' has less than 3 pages");
        ulong bytes = options.GetUInt64("bytes", Page, Page);
        if (bytes == 0 || bytes % 8 != 0) throw new ConfigurationException($"device 'edu-guest': option 'bytes': expected a multiple of 8, found {bytes}");
        _bytes = (int)bytes;
        _pci = services.Pci;
        _handler = services.RunState.Register(this, int.MaxValue);
        _interrupts = services.Scope.GetRequiredService<InterruptRouter>().Attach(this);
    }

    public string Id { get; }

    public void OnVmStateChange(bool running, RunState state)
    {
        _running = running;
        if (!running) return;
        if (Word(0) == 0) Begin();
        else if (Word(4) != 0) Step();
    }

    public void Reset()
    {
        _zeros.CopyTo(_block.Slice(0, _zeros.Length));
        _block.MarkDirty(0, (ulong)_zeros.Length);
    }

    public void SetIntx(int line, bool level)
    {
        // Ignored: the loop uses interrupts by message only.
    }

    public void SendMsi(MsiMessage message, ushort requesterId)
    {
        if (message.Data != MsiData) return;
        if (_running) Step();
        else Word(4, 1);
    }

    public void Dispose()
    {
        _handler.Dispose();
        _interrupts.Dispose();
    }

    private void Begin()
    {
        PciDevice edu = _pci.Functions.FirstOrDefault(static f => f.Config.GetUInt16(PciRegisters.VendorId) == 0x1234 && f.Config.GetUInt16(PciRegisters.DeviceId) == 0x11e8)
            ?? throw new DeviceNotFoundException($"device '{Id}': there is no edu function");
        ushort bdf = edu.Address.DevFn;
        int msi = edu.Msi!.Offset;
        _pci.ConfigWrite(bdf, PciRegisters.BaseAddress0, 4, (uint)BarAddress);
        _pci.ConfigWrite(bdf, PciRegisters.Command, 2, 6);
        _pci.ConfigWrite(bdf, msi + 4, 4, (uint)MsiAddress);
        _pci.ConfigWrite(bdf, msi + 8, 4, 0);
        _pci.ConfigWrite(bdf, msi + 12, 2, MsiData);
        _pci.ConfigWrite(bdf, msi + 2, 2, 1);
        Word(0, 1);
        Send();
    }

    private void Step()
    {
        long now = Stopwatch.GetTimestamp(); // CLOCK_MONOTONIC in ns
        Word(4, 0);
        _pci.MmioWrite(new GuestAddress(BarAddress + 0x64), 4, uint.MaxValue);
        ulong done = Word(0);
        bool isBack = done % 2 == 0;
        if (isBack && !_block.ReadOnlySlice(Page, _bytes).SequenceEqual(_block.ReadOnlySlice(2 * Page, _bytes))) Word(1, Word(1) + 1);
        if (Word(2) != 0) Word(3, Math.Max(Word(3), (ulong)now - Word(2)));
        Word(2, (ulong)now);
        Word(0, done + 1);
        if (isBack) Send();
        else Start(EduDevice.BufferAt, _block.Address.Value + (2 * Page), ToMemory);
    }

    private void Send()
    {
        Span<byte> page = _block.Slice(Page, Page);
        for (int at = 0; at < Page; at += 8) BinaryPrimitives.WriteUInt64LittleEndian(page[at..], DmaTestPattern.Mix(Word(0) + ((ulong)at << 40)));
        _block.MarkDirty(Page, Page);
        Start(_block.Address.Value + Page, EduDevice.BufferAt, 0);
    }

    private void Start(ulong source, ulong destination, ulong direction)
    {
        foreach ((ulong register, ulong value) in ((ulong, ulong)[])[(0x80, source), (0x88, destination), (0x90, (ulong)_bytes), (0x98, Run | Interrupt | direction)])
            _pci.MmioWrite(new GuestAddress(BarAddress + register), 8, value);
    }

    private ulong Word(int index) => BinaryPrimitives.ReadUInt64LittleEndian(_block.ReadOnlySlice((ulong)index * 8, 8));

    private void Word(int index, ulong value)
    {
        BinaryPrimitives.WriteUInt64LittleEndian(_block.Slice((ulong)index * 8, 8), value);
        _block.MarkDirty((ulong)index * 8, 8);
    }
}

/// <summary>Makes <see cref="EduGuest"/>s.</summary>
public sealed class EduGuestFactory : IDeviceFactory
{
    public string TypeName => "edu-guest";

    public string Summary => "keeps an edu function busy with DMA and counts its interrupts; block=NAME, bytes=N of a transfer";

    public IReadOnlyList<IVmStateDescription> Descriptions => [];

    public IVmDevice Create(DeviceOptions options, IDeviceServices services) => new EduGuest(options, services);
}

/// <summary>Adds the device type <c>edu-guest</c>.</summary>
public sealed class EduGuestPlugin : IVmmPlugin
{
    public void Configure(VmmBuilder builder)
    {
        ArgumentNullException.ThrowIfNull(builder);
        builder.AddDevice<EduGuestFactory>();
    }
}
