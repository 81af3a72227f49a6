using System.Net;
using System.Net.Sockets;
using System.Text.Json.Nodes;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Interop;

/// <summary>An address of <c>--incoming</c> is listened on where QEMU 11.1 listens on it: with both families, with one, with all addresses of a name.</summary>
[TestFixture, Category(QemuVersions.Category)]
public sealed class ListenAddressQemuTests
{
    private static readonly IPAddress[] s_clients = [IPAddress.Loopback, IPAddress.IPv6Loopback];

    [Test]
    public void TheSameFamiliesAreListenedOn(
        [Values("", "localhost", "127.0.0.1", "[::1]", "0.0.0.0", "[::]")] string host,
        [Values("", ",ipv4=off", ",ipv6=off", ",ipv4=on", ",ipv6=on", ",ipv4", ",ipv4=on,ipv6=on", ",ipv4=off,ipv6=off", ",ipv4=off,ipv6=on", ",ipv4=on,ipv6=off")] string options)
    {
        int port = FreePort();
        string uri = $"tcp:{host}:{port}{options}";
        string theirs, ours;
        using (var qemu = new QemuProcess("11.1", 1 << 20, "m", "-incoming", "defer"))
        {
            try
            {
                qemu.Run("migrate-incoming", new JsonObject { ["uri"] = uri });
                qemu.Signal("STOP"); // else it could take the first connection, and listen no more, before the second comes
                theirs = Reachable(port);
            }
            catch (QmpErrorException)
            {
                theirs = "refused";
            }
        }
        using (TestVm vm = TestVm.WithRam(1 << 20, incoming: true))
        {
            try
            {
                vm.Engine.MigrateIncoming(MigrationAddress.Parse(uri));
                ours = Reachable(port);
                Assert.That(vm.Engine.Query().SocketAddresses.Select(static a => a.Port), Is.All.EqualTo(port));
            }
            catch (VmmException)
            {
                ours = "refused";
            }
        }
        Assert.That(ours, Is.EqualTo(theirs));
    }

    /// <summary>With port 0 all families get one port, so that a source needs to know only one.</summary>
    [Test]
    public async Task AChosenPortIsTheSameForBothFamilies([Values("127.0.0.1", "[::1]", "localhost")] string to)
    {
        using TestVm source = TestVm.WithRam(1 << 20).FilledRandom(1), destination = TestVm.WithRam(1 << 20, incoming: true);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp::0"));
        IReadOnlyList<MigrationAddress> addresses = destination.Engine.Query().SocketAddresses;
        Assert.That(addresses.Select(static a => a.Host), Is.EquivalentTo(new[] { "0.0.0.0", "::" }));
        Assert.That(addresses[0].Port, Is.EqualTo(addresses[1].Port));
        MigrationStatus sent = await source.Engine.Migrate(MigrationAddress.Parse($"tcp:{to}:{addresses[0].Port}")).WaitAsync(QemuProcess.Deadline);
        Assert.That(sent, Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed));
    }

    [Test]
    public async Task MultifdComesInOnBothFamilies([Values("127.0.0.1", "[::1]")] string to)
    {
        using TestVm source = TestVm.WithRam(1 << 20).FilledRandom(2), destination = TestVm.WithRam(1 << 20, incoming: true);
        foreach (TestVm vm in (TestVm[])[source, destination]) vm.Engine.SetCapabilities([new(MigrationCapability.Multifd, true), new(MigrationCapability.ReturnPath, true)]);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp::0"));
        MigrationStatus sent = await source.Engine.Migrate(MigrationAddress.Parse($"tcp:{to}:{destination.Engine.Query().SocketAddresses[0].Port}")).WaitAsync(QemuProcess.Deadline);
        Assert.That(sent, Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(QemuProcess.Deadline), Is.EqualTo(MigrationStatus.Completed));
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
    }

    /// <summary>A port that somebody else has in one family is no port to wait on: half of the sources would reach the other.</summary>
    [Test]
    public void APortThatIsTakenInOneFamilyIsRefusedOrTheNextIsTried([Values] bool ipv6)
    {
        using var other = new TcpListener(ipv6 ? IPAddress.IPv6Any : IPAddress.Any, 0);
        if (ipv6) other.Server.DualMode = false;
        other.Start();
        int port = ((IPEndPoint)other.LocalEndpoint!).Port;
        using TestVm vm = TestVm.WithRam(1 << 20, incoming: true);
        Assert.That(() => vm.Engine.MigrateIncoming(MigrationAddress.Parse($"tcp::{port}")), Throws.TypeOf<ChannelException>().With.Message.Contains("Address already in use"));
        Assert.That(port, Is.LessThan(65000), "there are ports behind it");
        vm.Engine.MigrateIncoming(MigrationAddress.Parse($"tcp::{port},to={port + 100}"));
        Assert.That(vm.Engine.Query().SocketAddresses, Has.Count.EqualTo(2).And.All.Matches<MigrationAddress>(a => a!.Port > port));
    }

    private static string Reachable(int port) => string.Join(' ', s_clients.Where(ip => CanConnect(ip, port)));

    private static bool CanConnect(IPAddress ip, int port)
    {
        using var socket = new Socket(ip.AddressFamily, SocketType.Stream, ProtocolType.Tcp);
        try
        {
            socket.Connect(ip, port);
            return true;
        }
        catch (SocketException)
        {
            return false;
        }
    }

    /// <summary>A port that is free in both families.</summary>
    private static int FreePort()
    {
        using var both = new TcpListener(IPAddress.IPv6Any, 0);
        both.Server.DualMode = true;
        both.Start();
        return ((IPEndPoint)both.LocalEndpoint!).Port;
    }
}
