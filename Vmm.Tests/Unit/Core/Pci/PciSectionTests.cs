using System.Text.Json;
using Vmm.Core.Errors;
using Vmm.Core.Pci;
using Vmm.Core.VmStates;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Golden = Vmm.Tests.Support.Golden;

namespace Vmm.Tests.Unit.Core.Pci;

[TestFixture]
public sealed class PciSectionTests
{
    [Test]
    public void TheBusSavesOnlyWhileItHasFunctions()
    {
        using var services = new TestServices();
        Assert.That(services.SaveVm.Entries(), Is.Empty);
        using (services.Bql.Acquire())
        {
            var a = new FakePciDevice(services.Pci, "a");
            var b = new FakePciDevice(services.Pci, "b");
            Assert.That(services.SaveVm.Entries().Select(static e => $"{e} v{e.VersionId}"), Is.EqualTo((string[])["PCIHost/0 v1", "PCIBUS/0 v1"]));
            a.Dispose();
            Assert.That(services.SaveVm.Entries(), Has.Count.EqualTo(2));
            b.Dispose();
        }
        Assert.That(services.SaveVm.Entries(), Is.Empty);
    }

    [Test]
    public void BodiesAreQemus()
    {
        using var services = new TestServices();
        using (services.Bql.Acquire())
        {
            using var device = new FakePciDevice(services.Pci);
            device.SetIntx(true);
            services.Pci.PioWrite(0xcf8, 4, 0x80000810);
            Assert.That(SectionBytes.Save(PciHost.HostState, services.Pci), Is.EqualTo(SectionBytes.Hex("80000810")));
            Assert.That(SectionBytes.Save(PciHost.BusState, services.Pci), Is.EqualTo(SectionBytes.Hex("00000004 00000000 00000001 00000000 00000000")));
            byte[] body = SectionBytes.Save(PciDevice.PciState, device);
            Assert.That(body, Is.EqualTo((byte[])[0, 0, 0, 2, .. device.Config.Bytes, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
        }
    }

    /// <summary>The descriptions of the PCI core name the same fields, versions and conditions as QEMU 7.2's own dump.</summary>
    [Test]
    public void DescriptionsEqualQemusDump()
    {
        using JsonDocument qemu = JsonDocument.Parse(Golden.Read("dump-vmstate-72.json"));
        JsonElement pci = qemu.RootElement.GetProperty("e1000").GetProperty("Description").GetProperty("Fields")[0].GetProperty("Description");
        JsonElement host = qemu.RootElement.GetProperty("i440FX-pcihost").GetProperty("Description");
        Assert.That(Fields(PciDevice.PciState), Is.EqualTo(Fields(pci)));
        Assert.That(Fields(PciHost.HostState), Is.EqualTo(Fields(host)));
        Assert.That((PciDevice.PciState.Name, PciDevice.PciState.VersionId, PciDevice.PciState.MinimumVersionId), Is.EqualTo(("PCIDevice", 2, 1)));
        Assert.That((PciHost.HostState.Name, PciHost.HostState.VersionId), Is.EqualTo((host.GetProperty("name").GetString(), host.GetProperty("version_id").GetInt32())));
    }

    [Test]
    public void VmDescTypesAreQemus()
    {
        using var services = new TestServices();
        using (services.Bql.Acquire())
        {
            using var device = new FakePciDevice(services.Pci);
            string desc = SectionBytes.Describe(PciDevice.PciState, device);
            Assert.That(Types(desc), Is.EqualTo((string[])["version_id int32 le 4", "config[0] pci config 256", "irq_state pci irq state 16"]));
            Assert.That(Types(SectionBytes.Describe(PciHost.BusState, services.Pci)), Is.EqualTo((string[])["nirq int32 equal 4", "irq_count int32 4"]));
            Assert.That(Types(SectionBytes.Describe(PciDevice.MsixState, device)), Is.EqualTo((string[])["msix msix state 65"]));
        }
    }

    [Test]
    public void ADifferentIdentityIsRefusedWithItsOffset()
    {
        using var services = new TestServices();
        using (services.Bql.Acquire())
        {
            using var device = new FakePciDevice(services.Pci);
            byte[] body = SectionBytes.Save(PciDevice.PciState, device), before = device.Config.Bytes.ToArray();
            body[4 + 2] ^= 0x10;
            body[4 + 0x3c] = 9;
            var error = Assert.Throws<IncompatibleStateException>(() => SectionBytes.Load(PciDevice.PciState, device, body));
            Assert.That(error!.Message, Does.Contain("offset 0x02").And.Contain("expected 0x34, found 0x24"));
            Assert.That(device.Config.Bytes.ToArray(), Is.EqualTo(before));
        }
    }

    [TestCase("00000004 00000000 000003e8 00000000 00000000")]
    [TestCase("00000004 00000000 ffffffff 00000000 00000000")]
    public void ImpossibleLineCountsAreRefused(string body)
    {
        using var services = new TestServices();
        Assert.Throws<DeviceStateException>(() => SectionBytes.Load(PciHost.BusState, services.Pci, SectionBytes.Hex(body)));
    }

    [Test]
    public void AnotherNumberOfLinesIsRefused()
    {
        using var services = new TestServices();
        Assert.Throws<StreamFormatException>(() => SectionBytes.Load(PciHost.BusState, services.Pci, SectionBytes.Hex("00000008" + new string('0', 64))));
    }

    [Test]
    public void LinesComeUpWhenTheBusIsLoaded()
    {
        using var services = new TestServices();
        SectionBytes.Load(PciHost.BusState, services.Pci, SectionBytes.Hex("00000004 00000000 00000002 00000000 00000001"));
        Assert.That(services.Interrupts.Levels, Is.EqualTo((bool[])[false, true, false, true]));
    }

    [Test]
    public void MsixStateIsTableThenPendingBits()
    {
        using var services = new TestServices();
        using (services.Bql.Acquire())
        {
            using var device = new FakePciDevice(services.Pci);
            device.Msix!.WriteTable(16, 8, 0xfee00000);
            device.Msix.Notify(3);
            byte[] body = SectionBytes.Save(PciDevice.MsixState, device);
            Assert.That(body, Has.Length.EqualTo(65));
            Assert.That(body[16..24], Is.EqualTo(SectionBytes.Hex("0000e0fe00000000")));
            Assert.That(body[64], Is.EqualTo(8));
            using var other = new FakePciDevice(services.Pci, "other");
            SectionBytes.Load(PciDevice.MsixState, other, body);
            Assert.That(SectionBytes.Save(PciDevice.MsixState, other), Is.EqualTo(body));
            Assert.That(other.Msix!.IsPending(3), Is.True);
        }
    }

    private static string[] Fields(JsonElement description) =>
        [.. description.GetProperty("Fields").EnumerateArray().Select(static f =>
            $"{f.GetProperty("field").GetString()} since {f.GetProperty("version_id").GetInt32()} conditional {f.GetProperty("field_exists").GetBoolean()} size {f.GetProperty("size").GetInt32()}")];

    private static string[] Fields(IVmStateDescription description) =>
        [.. description.Fields.Select(static f => $"{f.Name} since {f.VersionId} conditional {f.HasFieldExists} size {f.SizeBytes}")];

    private static string[] Types(string desc)
    {
        using JsonDocument json = JsonDocument.Parse(desc);
        return [.. json.RootElement.GetProperty("fields").EnumerateArray().Select(static f =>
            $"{f.GetProperty("name").GetString()} {f.GetProperty("type").GetString()} {f.GetProperty("size").GetInt64()}")];
    }
}
