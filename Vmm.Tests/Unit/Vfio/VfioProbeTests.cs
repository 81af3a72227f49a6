using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Probe;
using Vmm.Tests.Fakes;

namespace Vmm.Tests.Unit.Vfio;

/// <summary>The probe describes a host and its devices.</summary>
internal sealed class VfioProbeTests
{
    private const string Address = "0000:00:01.0", Uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    private FakeVfioHost _host = null!;

    [SetUp]
    public void SetUp() => _host = new FakeVfioHost();

    [TearDown]
    public void TearDown()
    {
        Assert.That(_host.Kernel.OpenCount, Is.Zero);
        _host.Dispose();
    }

    [Test]
    public void A_host_is_listed_by_group_without_opening_anything()
    {
        _host.AddPci("0000:00:1f.0", driver: "lpc_ich", group: "10");
        _host.AddPci(Address, group: "9", cdev: "vfio0");
        _host.AddPci("0000:00:01.1", driver: null, group: "9");
        _host.AddMediated(Uuid, group: "11");
        _host.AddNode(_host.Paths.Container);
        _host.AddNode(_host.Paths.Group("9"));
        VfioHostReport report = VfioProbe.Host(_host.Paths);
        Assert.That((report.HasContainerNode, report.HasIommufdNode), Is.EqualTo((true, false)));
        Assert.That(report.Devices, Is.EqualTo(new[]
        {
            new VfioMemberReport("9", true, Address, "vfio-pci", true, "vfio0"), new VfioMemberReport("9", true, "0000:00:01.1", null, false, null),
            new VfioMemberReport("10", false, "0000:00:1f.0", "lpc_ich", false, null), new VfioMemberReport("11", false, Uuid, "vfio_mdev", true, null),
        }));
        Assert.That(_host.Kernel.Calls, Is.Empty);
    }

    [Test]
    public void A_host_without_groups_has_an_empty_list() => Assert.That(VfioProbe.Host(_host.Paths).Devices, Is.Empty);

    [Test]
    public void A_device_of_protocol_2_tells_all()
    {
        FakeKernelDevice device = _host.AddPci(Address);
        device.Features[1] = BitConverter.GetBytes(5UL);
        device.Features[6] = [];
        device.Features[9] = BitConverter.GetBytes(96UL);
        device.MigState = (uint)VfioDeviceState.PreCopy;
        VfioDeviceReport report = Probe(Address);
        Assert.Multiple(() =>
        {
            Assert.That((report.Name, report.Container, report.Protocol), Is.EqualTo((Address, "type1 container", 2)));
            Assert.That(report.States, Is.EqualTo(new[] { "stop", "running", "stop-copy", "resuming", "pre-copy" }));
            Assert.That((report.FoundIn, report.StateBytes, report.CanLogDma, report.ContainerCanLogDirty), Is.EqualTo(("pre-copy", (ulong?)96, true, false)));
            Assert.That(report.Regions.Select(static r => r.Index), Is.EqualTo(new[] { 7u }));
            Assert.That(report.Irqs.Select(static i => (i.Index, i.Count)), Is.EqualTo(new[] { (0u, 1u), (2u, 4u) }));
            Assert.That(report.Blockers, Is.Empty);
        });
    }

    [Test]
    public void A_device_of_protocol_1_is_known_by_its_region()
    {
        _host.AddPci(Address).Regions[9] = (3, 0x2000, [2, 0, 1, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0]);
        VfioDeviceReport report = Probe(Address);
        Assert.That((report.Protocol, report.States.Count), Is.EqualTo((1, 0)));
        Assert.That(report.Blockers.Single(), Does.Contain("logs DMA writes"));
    }

    [TestCase(null, "does not support migration")]
    [TestCase(2ul, "no STOP_COPY")]
    public void A_device_that_cannot_migrate_says_why(ulong? flags, string expected)
    {
        FakeKernelDevice device = _host.AddPci(Address);
        if (flags is { } f) device.Features[1] = BitConverter.GetBytes(f);
        VfioDeviceReport report = Probe(Address);
        Assert.That((report.Protocol, report.Blockers.Count), Is.EqualTo((0, 1)));
        Assert.That(report.Blockers[0], Does.Contain(expected));
    }

    [Test]
    public void A_mediated_device_is_found_by_uuid_and_any_by_path()
    {
        _host.AddMediated(Uuid, group: "11");
        Assert.That(Probe(Uuid).Name, Is.EqualTo(Uuid));
        Assert.That(Probe($"{_host.Paths.MediatedDevices}/{Uuid}/").Name, Is.EqualTo(Uuid));
    }

    [Test]
    public void What_is_no_device_is_refused()
    {
        Assert.That(() => Probe("eth0"), Throws.TypeOf<ConfigurationException>().With.Message.Contains("'eth0'"));
        Assert.That(() => Probe(Address), Throws.TypeOf<VfioException>().With.Message.Contains("no such device"));
    }

    private VfioDeviceReport Probe(string device) => VfioProbe.Device(device, _host.Paths, _host.Kernel);
}
