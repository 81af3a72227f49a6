using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Core.Devices;

[TestFixture]
public sealed class SerialDeviceTests
{
    private TempDirectory _directory = null!;
    private string File => _directory["com1"];

    [SetUp]
    public void SetUp() => _directory = new TempDirectory();

    [TearDown]
    public void TearDown() => _directory.Dispose();

    [Test]
    public void OutputIsAppendedToTheFile()
    {
        System.IO.File.WriteAllText(File, "before ");
        using var services = new TestServices();
        using (var device = new SerialDevice(DeviceOptions.Parse($"serial,output={File}"), services)) Send(device, "hello");
        Assert.That(System.IO.File.ReadAllText(File), Is.EqualTo("before hello"));
    }

    [Test]
    public void OutputIsThereWhenTheVmStops()
    {
        using var services = new TestServices();
        using var device = new SerialDevice(DeviceOptions.Parse($"serial,output={File}"), services);
        Send(device, "partial line");
        device.OnVmStateChange(false, RunState.Paused);
        Assert.That(System.IO.File.ReadAllText(File), Is.EqualTo("partial line"));
    }

    [Test]
    public void BothSidesOfAMoveMayShareTheFile()
    {
        using var services = new TestServices();
        using var source = new SerialDevice(DeviceOptions.Parse($"serial,id=a,output={File}"), services);
        using var destination = new SerialDevice(DeviceOptions.Parse($"serial,id=b,output={File}"), services);
        Send(source, "source ");
        source.OnVmStateChange(false, RunState.Paused);
        destination.OnVmStateChange(true, RunState.Running);
        Send(destination, "destination");
        destination.OnVmStateChange(false, RunState.Paused);
        Assert.That(System.IO.File.ReadAllText(File), Is.EqualTo("source destination"));
    }

    [Test]
    public void AFileThatCannotBeOpenedIsRefusedByOption()
    {
        using var services = new TestServices();
        string path = Path.Combine(_directory["missing"], "com1");
        var error = Assert.Throws<ConfigurationException>(() => new SerialDevice(DeviceOptions.Parse($"serial,output={path}"), services).Dispose());
        Assert.That(error!.Message, Does.Contain("option 'output'").And.Contain(path));
        Assert.That(services.SaveVm.Entries(), Is.Empty);
    }

    [Test]
    public void AFailingDiskDropsOutputButNotTheGuest()
    {
        if (!System.IO.File.Exists("/dev/full")) Assert.Ignore("no /dev/full on this system");
        using var services = new TestServices();
        using var device = new SerialDevice(DeviceOptions.Parse("serial,output=/dev/full"), services);
        Assert.DoesNotThrow(() => Send(device, "lost\nlost\n"));
        Assert.That(device.Port.ReadRegister(5), Is.EqualTo(0x60));
    }

    [Test]
    public void DisposeUnregisters()
    {
        using var services = new TestServices();
        new SerialDevice(DeviceOptions.Parse("serial"), services).Dispose();
        Assert.That((services.SaveVm.Entries().Count, services.Time.TimerCount), Is.EqualTo((0, 0)));
    }

    private static void Send(SerialDevice device, string text)
    {
        foreach (char c in text) device.Port.WriteRegister(0, (byte)c);
    }
}
