using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.RawVfioUserClient;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>Clients come and go and leave nothing behind (vfio-user 7, S-33, S-59). Not parallel, because the tests count descriptors.</summary>
[TestFixture]
[NonParallelizable]
internal sealed class ServerLifeTests
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(20);

    private static RawVfioUserClient Dial(string path)
    {
        OwnedFd socket = Posix.Socket(Posix.AF_UNIX);
        Errno errno = Posix.Connect(socket, Posix.UnixAddress(path), null, 5000);
        Assert.That(errno, Is.EqualTo(Errno.None));
        return new RawVfioUserClient(socket);
    }

    [Test]
    public void S59_TheSocketIsPrivateServesOneAfterTheOtherAndIsRemovedAtTheEnd()
    {
        using var folder = new TempDirectory();
        using var fake = new FakeVfioUserBackend();
        string path = folder["device"];
        using (var server = new VfioUserServer(fake))
        {
            server.Listen(path);
            Assert.That(File.GetUnixFileMode(path), Is.EqualTo(UnixFileMode.UserRead | UnixFileMode.UserWrite));
            using RawVfioUserClient first = Dial(path), second = Dial(path);
            first.Negotiate();
            first.RegionWrite(0, 0, 42);
            first.HangUp();
            second.Negotiate();
            Assert.That(second.Read32(0, 0), Is.EqualTo(42));
            Assert.That(server.Stats.Sessions, Is.EqualTo(2));
            server.Stop();
            Assert.That(server.Completed.Wait(s_deadline));
        }
        Assert.That(File.Exists(path), Is.False);
    }

    [Test]
    public void S59_AStaleSocketIsReplacedALiveOneAndAFileAreNot()
    {
        using var folder = new TempDirectory();
        string path = folder["device"];
        using (OwnedFd stale = Posix.Socket(Posix.AF_UNIX)) Posix.Bind(stale, Posix.UnixAddress(path));
        Assert.That(File.Exists(path));
        using var fake = new FakeVfioUserBackend();
        using var other = new FakeVfioUserBackend();
        using var server = new VfioUserServer(fake);
        server.Listen(path);
        using (var rival = new VfioUserServer(other)) Assert.That(() => rival.Listen(path), Throws.TypeOf<ConfigurationException>().With.Message.Contains("another process"));
        File.WriteAllText(folder["file"], "x");
        using (var rival = new VfioUserServer(other)) Assert.That(() => rival.Listen(folder["file"]), Throws.TypeOf<ConfigurationException>());
        Assert.That(File.ReadAllText(folder["file"]), Is.EqualTo("x"));
        using (var rival = new VfioUserServer(other)) Assert.That(() => rival.Listen(folder[new string('p', 120)]), Throws.TypeOf<ConfigurationException>());
        using RawVfioUserClient client = Dial(path);
        client.Negotiate();
    }

    [Test]
    public void S59_AClientThatWaitsForTheFileIsNeverRefused([Values] bool isLong)
    {
        using var folder = new TempDirectory();
        string path = folder[isLong ? new string('p', Posix.MaxUnixPathBytes - folder.Path.Length - 1) : "device"];
        for (int i = 0; i < 100; i++)
        {
            using var fake = new FakeVfioUserBackend();
            using var server = new VfioUserServer(fake);
            Task<Errno> client = Task.Run(() =>
            {
                while (!Path.Exists(path)) Thread.SpinWait(1);
                using OwnedFd fd = Posix.Socket(Posix.AF_UNIX);
                return Posix.Connect(fd, Posix.UnixAddress(path), null, 1000);
            });
            server.Listen(path);
            Assert.That(client.Wait(s_deadline));
            Assert.That(client.Result, Is.EqualTo(Errno.None), $"attempt {i}");
        }
        Assert.That(Directory.GetFileSystemEntries(folder.Path), Is.Empty);
    }

    [Test]
    public void S59_ADeepFolderThatLeavesRoomForNoOtherNameWorks()
    {
        using var folder = new TempDirectory();
        string deep = folder[new string('d', Posix.MaxUnixPathBytes - folder.Path.Length - 3)];
        Directory.CreateDirectory(deep);
        using var fake = new FakeVfioUserBackend();
        using (var server = new VfioUserServer(fake))
        {
            server.Listen(Path.Combine(deep, "s"));
            using RawVfioUserClient client = Dial(Path.Combine(deep, "s"));
            client.Negotiate();
        }
        Assert.That(Directory.GetFileSystemEntries(deep), Is.Empty);
    }

    [Test]
    public void OnceEndsAfterTheFirstClientThatAgreedOnAVersion()
    {
        using var folder = new TempDirectory();
        using var fake = new FakeVfioUserBackend();
        using var server = new VfioUserServer(fake, new VfioUserServerOptions { Once = true });
        server.Listen(folder["device"]);
        Dial(folder["device"]).Dispose();
        using (RawVfioUserClient client = Dial(folder["device"])) client.Negotiate();
        Assert.That(server.Completed.Wait(s_deadline));
    }

    [Test]
    public void StopDisconnectsTheClientThatIsThere()
    {
        using var folder = new TempDirectory();
        using var fake = new FakeVfioUserBackend();
        using var server = new VfioUserServer(fake);
        server.Listen(folder["device"]);
        using RawVfioUserClient client = Dial(folder["device"]);
        client.Negotiate();
        server.Stop();
        Assert.That(client.ReceiveOrEnd(), Is.Null);
        Assert.That(server.Completed.Wait(s_deadline));
    }

    [Test]
    public void S33_ADisconnectIsQuietFirstThenDropsMapsAndEventFdsAndKeepsTheDevice()
    {
        var fake = new FakeVfioUserBackend();
        using var served = new ServedDevice(fake);
        using var ram = new VfioUserMemory("guest", 0x4000);
        using (RawVfioUserClient client = served.Attach())
        {
            using OwnedFd vector = Posix.EventFd();
            client.Map(0, 0x1000, ram.Fd);
            client.Map(0x1000, 0x1000, ram.Fd, 0x1000, flags: 3 | 8);
            client.StartLog();
            client.SetIrqs(0x24, 2, 0, 1, vector);
            client.SetState(VfioDeviceState.PreCopy);
            fake.Log.Clear();
        }
        served.Ended();
        Assert.That(fake.Log, Is.EqualTo((string[])["quiesce", "client lost", "unquiesce"]));
        Assert.That((fake.Host.Dma.RegionCount, fake.Host.Dma.IsLogging, fake.Host.Irqs.BoundCount, served.Server.State), Is.EqualTo((0, false, 0, VfioDeviceState.Running)));
        Assert.That(fake.Host.Dma.Write(0, new byte[1]), Is.EqualTo(Errno.EFAULT));
        fake.Host.Irqs.Raise(2, 0);
        using OwnedFd later = Posix.EventFd();
        using RawVfioUserClient next = served.Attach();
        next.SetIrqs(0x24, 2, 0, 1, later);
        Assert.That(IsSignalled(later), "the next client receives the interrupt that was raised between the clients");
    }

    [Test]
    public void S33_AClientThatGoesWhileTheDeviceBecomesQuietIsCleanedUpAfterwards()
    {
        var fake = new FakeVfioUserBackend();
        using var served = new ServedDevice(fake);
        var quiet = new TaskCompletionSource<Errno>(TaskCreationOptions.RunContinuationsAsynchronously);
        using RawVfioUserClient client = served.Attach();
        fake.OnQuiesce = () => new ValueTask<Errno>(quiet.Task);
        client.Send(VfioUserCommand.DeviceReset, []);
        LeakCheck.WaitFor(() => served.Server.Stats.Messages == 1, "the request did not arrive");
        client.HangUp();
        quiet.SetResult(Errno.None);
        served.Ended();
        Assert.That((fake.Quiesced, fake.Log.Count(static l => l == "reset Device")), Is.EqualTo((0, 1)));
    }

    [Test]
    public void S03_S33_NoDescriptorIsLeftByAnySession()
    {
        var fake = new FakeVfioUserBackend();
        using var served = new ServedDevice(fake, new VfioUserServerOptions { LegacyMigrationRegion = true });
        using var ram = new VfioUserMemory("guest", 0x4000);
        void Session(int round)
        {
            using RawVfioUserClient client = served.Connect();
            using VfioUserReply version = client.Ask(VfioUserCommand.Version, round % 2 == 0 ? Version(null) : Version("""{"capabilities":{"twin_socket":{"supported":true}},"x":"................................................................"}"""));
            using OwnedFd fd = Posix.EventFd();
            client.Map(0, 0x1000, ram.Fd);
            client.Map(0x1000, 0x1000, ram.Fd, 0x1000, flags: 3 | 8);
            client.Map(0, 0x1000, ram.Fd);
            client.Fails(Errno.EINVAL, VfioUserCommand.DmaMap, MapRequest(0x800, 0x1000), ram.Fd);
            client.SetIrqs(0x24, 2, 0, 2, fd, fd);
            client.SetIrqs(0x24, 2, 0, 1, fd);
            client.Fails(Errno.EINVAL, VfioUserCommand.DeviceSetIrqs, Bytes(20, 0x24, 2, 0, 1), fd, fd, fd);
            using VfioUserReply info = client.Ask(VfioUserCommand.DeviceGetInfo, Bytes(16, 0, 0, 0), fd, fd);
            using VfioUserReply region = client.Ask(VfioUserCommand.DeviceGetRegionInfo, Bytes(32, 0, 2, 0, 0UL, 0UL), fd);
            client.SetState(round % 3 == 0 ? VfioDeviceState.Resuming : VfioDeviceState.PreCopy);
            if (round % 5 == 0) client.SendRaw([1, 2, 3], fd);
        }
        Session(1);
        served.Ended();
        List<string> before = LeakCheck.SettledDescriptors();
        for (int round = 0; round < 40; round++) Session(round);
        served.Ended();
        LeakCheck.NoMoreThan(before);
    }

    [Test]
    public void MessagesOfTheFastPathsAllocateNothing()
    {
        var fake = new FakeVfioUserBackend { State = new byte[64 << 20] };
        using var served = new ServedDevice(fake);
        using RawVfioUserClient client = served.Attach();
        client.SetState(VfioDeviceState.StopCopy);
        byte[] request = [.. Bytes((ushort)1, (ushort)17, 24, 0, 0, 8 + 65536, 65536)];
        byte[] reply = new byte[16 + 8 + 65536];
        void Exchange()
        {
            client.SendRaw(request);
            client.ReceiveRaw(reply);
        }
        for (int i = 0; i < 50; i++) Exchange();
        // Take the least of several rounds, because the count covers the whole process and the runtime allocates at any time.
        long least = long.MaxValue;
        for (int round = 0; round < 8; round++)
        {
            long before = GC.GetTotalAllocatedBytes(precise: true);
            for (int i = 0; i < 100; i++) Exchange();
            least = Math.Min(least, GC.GetTotalAllocatedBytes(precise: true) - before);
        }
        Assert.That(least, Is.LessThan(100 * 100), "100 messages of 64 KiB allocate less than 100 bytes each");
    }
}
