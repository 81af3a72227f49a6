using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.VmStates;
using Vmm.Core.Workloads;
using static Vmm.Tests.Support.SectionBytes;

namespace Vmm.Tests.Unit.Core.Devices;

[TestFixture]
public sealed class DevicePluginTests
{
    private ServiceProvider _host = null!;
    private VmFactory _vms = null!;

    [SetUp]
    public void SetUp()
    {
        var services = new ServiceCollection();
        services.AddVmm().AddPlugin<SerialPlugin>().AddPlugin<WorkloadPlugin>();
        _host = services.BuildServiceProvider();
        _vms = _host.GetRequiredService<VmFactory>();
    }

    [TearDown]
    public void TearDown() => _host.Dispose();

    [Test]
    public void SectionsAreNumberedInOrderWithTheTimerFirst()
    {
        using Vm vm = Create("scratch", "serial", "scratch,id=second");
        Assert.That(vm.SaveVm.Entries().Select(static e => $"{e.SectionId} {e}"), Is.EqualTo(new[] { "0 timer/0", "1 scratch/0", "2 serial/0", "3 scratch/1" }));
    }

    [Test]
    public void DevicesFollowTheRunState()
    {
        using Vm vm = Create("scratch");
        var scratch = (ScratchDevice)vm.Devices[0];
        vm.Cont();
        vm.Stop();
        vm.Cont();
        Assert.That(scratch.Starts, Is.EqualTo(2));
        vm.Stop();
        Assert.That((vm.Clock.NowNs > 0, vm.Clock.NowTicks > 0), Is.EqualTo((true, true)));
    }

    [Test]
    public void StateMovesBetweenTwoVmsOfOneProcess()
    {
        using Vm source = Create("scratch", "serial");
        using Vm destination = Create("scratch", "serial");
        var from = (ScratchDevice)source.Devices[0];
        from.Value = 0x1234;
        from.Lock();
        ((SerialDevice)source.Devices[1]).Port.WriteRegister(7, 0x99);
        foreach ((var a, var b) in source.SaveVm.Entries().Zip(destination.SaveVm.Entries())) Load(b.VmState!, Save(a.VmState!));
        var to = (ScratchDevice)destination.Devices[0];
        to.Value = 1;
        Assert.That((to.Value, ((SerialDevice)destination.Devices[1]).Port.ReadRegister(7)), Is.EqualTo((0x1234u, (byte)0x99)));
    }

    [Test]
    public void AnUnknownOptionIsRefusedAndLeavesNothing()
    {
        Assert.That(Assert.Throws<ConfigurationException>(() => Create("serial,speed=9600"))!.Message, Does.Contain("'speed'"));
        Assert.That(Assert.Throws<ConfigurationException>(() => Create("scratch,output=x"))!.Message, Does.Contain("'output'"));
    }

    [Test]
    public void EveryFactoryOffersDescriptionsThatHoldTheRules()
    {
        IDeviceFactory[] factories = [.. _host.GetServices<IDeviceFactory>()];
        Assert.That(factories.Select(static f => f.TypeName), Is.EqualTo(new[] { "serial", "pattern", "ticker", "scratch" }));
        // The ticker's state is in the guest's RAM.
        Assert.That(factories.Where(static f => f.Descriptions.Count == 0).Select(static f => f.TypeName), Is.EqualTo(new[] { "ticker" }));
        foreach (IDeviceFactory factory in factories)
        {
            foreach (IVmStateDescription description in factory.Descriptions) Assert.DoesNotThrow(() => VmStateRules.Check(description), description.Name);
        }
    }

    private Vm Create(params string[] devices) => _vms.Create(new VmOptions { Devices = [.. devices.Select(DeviceOptions.Parse)] });
}
