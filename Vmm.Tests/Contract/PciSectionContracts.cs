using Vmm.Core.Pci;
using Vmm.Core.SaveVm;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Contract;

/// <summary>The PCIDevice part that each PCI function puts into its device's section.</summary>
[TestFixture(false)]
[TestFixture(true)]
internal sealed class PciDeviceContract(bool isExpress) : SaveVmContract<FakePciDevice>
{
    protected override (FakePciDevice Device, IVmStateSection Section) Create()
    {
        TestServices services = Held();
        var device = new FakePciDevice(services.Pci, express: isExpress);
        return (device, PciDevice.PciState.Bind(device));
    }

    protected override IEnumerable<(string, Action<FakePciDevice>)> States() =>
    [
        ("bars", static d => { Write(d, 0x10, 0xfe000000); Write(d, 0x14, 0xc000); Write(d, 0x1c, 1); Write(d, 4, 7); }),
        ("line", static d => { d.SetIntx(true); Write(d, 0x3c, 11); }),
        ("msi", static d => { Write(d, 0x44, 0xfee00000); Write(d, 0x40, 0x210000); Write(d, 0x0c, 0x10); }),
    ];

    protected override void Reset(FakePciDevice device)
    {
        device.Reset();
    }

    protected override (byte[], byte[]) OldestVersion()
    {
        byte[] now = SectionBytes.Save(Create().Section), old = now[..^16];
        old[3] = 1;
        return (old, [0, 0, 0, 1, .. now[4..]]);
    }

    /// <summary>Services whose BQL the test's thread holds, because sections save and load with the BQL held.</summary>
    internal static TestServices Held()
    {
        var services = new TestServices();
        services.Bql.Acquire();
        return services;
    }

    private static void Write(FakePciDevice device, int offset, uint value) => device.Host.ConfigWrite(device.Address.DevFn, offset, 4, value);
}

[TestFixture]
internal sealed class PciHostContract : SaveVmContract<PciHost>
{
    protected override (PciHost Device, IVmStateSection Section) Create()
    {
        var services = new TestServices();
        return (services.Pci, PciHost.HostState.Bind(services.Pci));
    }

    protected override IEnumerable<(string, Action<PciHost>)> States() => [("address", static h => h.PioWrite(0xcf8, 4, 0x8000_1234))];

    protected override void Reset(PciHost device) => device.PioWrite(0xcf8, 4, 0);

    protected override (byte[], byte[]) OldestVersion() => ([0x80, 0, 0x12, 0x34], [0x80, 0, 0x12, 0x34]);
}

[TestFixture]
internal sealed class PciBusContract : SaveVmContract<PciHost>
{
    protected override (PciHost Device, IVmStateSection Section) Create()
    {
        TestServices services = PciDeviceContract.Held();
        Assert.That(new FakePciDevice(services.Pci).Path, Is.EqualTo("0000:00:01.0"));
        return (services.Pci, PciHost.BusState.Bind(services.Pci));
    }

    protected override IEnumerable<(string, Action<PciHost>)> States() => [("a line", static h => Set(h, true))];

    protected override void Reset(PciHost device) => Set(device, false);

    protected override (byte[], byte[]) OldestVersion() => (SectionBytes.Hex("00000004 00000000 00000001 00000000 00000000"), SectionBytes.Hex("00000004 00000000 00000001 00000000 00000000"));

    private static void Set(PciHost host, bool level)
    {
        host.Find(new PciAddress(1, 0))!.SetIntx(level);
    }
}
