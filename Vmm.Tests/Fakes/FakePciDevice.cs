using Vmm.Core.Pci;

namespace Vmm.Tests.Fakes;

/// <summary>An emulated function: an MMIO BAR 0 of 4 KiB, ports in BAR 1, a 64-bit BAR 2 with MSI-X, MSI, pin A.</summary>
internal sealed class FakePciDevice : PciDevice
{
    internal static readonly MsixLayout Layout = new(4, TableBar: 2, TableOffset: 0x1000, PbaBar: 2, PbaOffset: 0x1800);

    internal FakePciDevice(PciHost host, string id = "fake", string? address = null, bool multiFunction = false, bool express = false, byte pin = 1)
        : base(host, new PciDeviceOptions { Id = id, Address = address, IsMultiFunction = multiFunction, IsExpress = express })
    {
        Config.SetUInt32(0, 0x1234_1af4);
        Config.Bytes[PciRegisters.InterruptPin] = pin;
        RegisterBar(0, PciBarType.Memory32, 4096);
        RegisterBar(1, PciBarType.Io, 32);
        RegisterBar(2, PciBarType.Memory64 | PciBarType.Prefetchable, 0x4000);
        AddMsi(0x40, 8, is64Bit: true, isMaskable: true);
        AddMsix(0x60, Layout);
    }

    /// <summary>The accesses that reached the device, in order.</summary>
    internal List<string> Log { get; } = [];

    internal ulong Answer { get; set; } = 0x1122334455667788;

    protected override ulong BarRead(int bar, ulong offset, int size)
    {
        Log.Add($"r{bar}+{offset:x}/{size}");
        return Answer;
    }

    protected override void BarWrite(int bar, ulong offset, int size, ulong value) => Log.Add($"w{bar}+{offset:x}/{size}={value:x}");
}
