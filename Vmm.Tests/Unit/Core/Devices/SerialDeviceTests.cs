using System.Net.Sockets;
using Vmm.Core.Cpr;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Core.Devices;

[TestFixture]
public sealed class SerialDeviceTests
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);
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
    public void TheNextProcessGetsTheSocketAndItsClient()
    {
        using var old = new TestServices();
        using var next = new TestServices();
        var before = new SerialDevice(DeviceOptions.Parse($"serial,id=com,socket={File}"), old);
        Run(before, old);
        using Socket client = Connect(old);
        client.Send("a"u8);
        Assert.That(Received(before, old), Is.EqualTo('a'));
        Leave(old, MigrationEvent.PrecopySetup);
        // The old process reads no more bytes and accepts no more connections: both belong to the next process.
        client.Send("bc"u8);
        using Socket another = Connect(null);
        using SerialDevice after = Inherit(old, next);
        Leave(old, MigrationEvent.PrecopyDone);
        before.Dispose();
        Assert.That(System.IO.File.Exists(File));
        Arrive(after, next);
        Assert.That((Received(after, next), Received(after, next)), Is.EqualTo(('b', 'c')));
        Send(after, "x");
        Assert.That(Next(client), Is.EqualTo('x'));
        // The next process has a client, so it refuses the other connection; the old process never accepted that connection.
        Assert.That(Next(another), Is.EqualTo('\0'));
        client.Dispose();
        Assert.That(SpinWait.SpinUntil(() => next.CprFds.Entries().Count == 1, s_deadline), "the client has left");
        using Socket third = Connect(next);
        third.Send("d"u8);
        Assert.That(Received(after, next), Is.EqualTo('d'));
        after.Dispose();
        Assert.That(System.IO.File.Exists(File), Is.False);
    }

    [Test]
    public void TheOldProcessGoesOnWithTheSocketWhenTheNextOneFails()
    {
        using var old = new TestServices();
        using var next = new TestServices();
        using var device = new SerialDevice(DeviceOptions.Parse($"serial,id=com,socket={File}"), old);
        Run(device, old);
        using Socket client = Connect(old);
        Leave(old, MigrationEvent.PrecopySetup);
        client.Send("ab"u8);
        Inherit(old, next).Dispose();
        Leave(old, MigrationEvent.PrecopyFailed);
        Assert.That((Received(device, old), Received(device, old)), Is.EqualTo(('a', 'b')));
        client.Dispose();
        Assert.That(SpinWait.SpinUntil(() => old.CprFds.Entries().Count == 1, s_deadline), "the client has left");
        using Socket another = Connect(old);
        another.Send("c"u8);
        Assert.That(Received(device, old), Is.EqualTo('c'));
    }

    private SerialDevice Inherit(TestServices old, TestServices next)
    {
        next.CprFds.Receive(new CprIncoming(MigrationMode.CprTransfer, [.. old.CprFds.Entries().Select(static e => e with { Fd = Posix.Duplicate(e.Fd) })], []));
        using (next.Bql.Acquire()) return new SerialDevice(DeviceOptions.Parse($"serial,id=com,socket={File}"), next);
    }

    private static void Leave(TestServices old, MigrationEvent what)
    {
        using (old.Bql.Acquire()) old.Notifiers.Notify(what, MigrationMode.CprTransfer);
    }

    private static void Arrive(SerialDevice device, TestServices next)
    {
        using (next.Bql.Acquire()) next.CprFds.EndIncoming();
        Run(device, next);
    }

    private static void Run(SerialDevice device, TestServices services)
    {
        using (services.Bql.Acquire()) device.OnVmStateChange(true, RunState.Running);
    }

    /// <summary>Connects a client; with services given, waits until their device has accepted it.</summary>
    private Socket Connect(TestServices? services)
    {
        var client = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified) { ReceiveTimeout = (int)s_deadline.TotalMilliseconds };
        client.Connect(new UnixDomainSocketEndPoint(File));
        if (services is not null) Assert.That(SpinWait.SpinUntil(() => services.CprFds.Entries().Count == 2, s_deadline), "the descriptor table has the listener and the client");
        return client;
    }

    /// <summary>Waits for the next character that the guest receives.</summary>
    private static char Received(SerialDevice device, TestServices services)
    {
        char received = default;
        Assert.That(SpinWait.SpinUntil(() =>
        {
            using (services.Bql.Acquire())
            {
                if ((device.Port.ReadRegister(5) & 1) == 0) return false;
                received = (char)device.Port.ReadRegister(0);
                return true;
            }
        }, s_deadline), "no character arrived");
        return received;
    }

    /// <summary>Waits for the next character that the client receives; 0 once the connection has ended.</summary>
    private static char Next(Socket client)
    {
        byte[] one = new byte[1];
        return client.Receive(one) == 0 ? '\0' : (char)one[0];
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
