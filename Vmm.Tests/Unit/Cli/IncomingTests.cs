using System.Net;
using System.Net.Sockets;
using System.Text.Json.Nodes;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Qmp;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Cli;

/// <summary>A <c>vmm run --incoming</c> that waits.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class IncomingTests
{
    /// <summary>Far more connections come than the process may have descriptors; the migration after them needs some too.</summary>
    [Test]
    public async Task AFloodOfConnectionsLeavesDescriptorsForTheMigration([Values] bool multifd)
    {
        const int limit = 256, many = 500;
        await using var vmm = new VmmCommands();
        using TestVm source = TestVm.WithRam(4 << 20).FilledRandom(1);
        source.Vm.Cont();
        int port = FreePort();
        VmmCommands.Running destination = vmm.StartThrough(["sh"], $"ulimit -n {limit}; exec \"$@\"",
            "run", "--name", "b", "--memory", "4M,id=m", "--accel", "none", "--incoming", $"tcp:127.0.0.1:{port}");
        await destination.Line("ready:");
        using (var monitor = QmpClient.Connect(vmm["vmm/b.qmp"], VmmCommands.Deadline))
            monitor.Execute("migrate-set-capabilities", (JsonObject)JsonNode.Parse($$"""{"capabilities":[{"capability":"multifd","state":{{(multifd ? "true" : "false")}}}]}""")!, VmmCommands.Deadline);
        List<Socket> strays = [];
        try
        {
            for (int i = 0; i < many; i++)
            {
                var socket = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
                strays.Add(socket);
                await socket.ConnectAsync(IPAddress.Loopback, port);
            }
            source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true), new(MigrationCapability.Multifd, multifd)]);
            MigrationStatus sent = await source.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{port}")).WaitAsync(VmmCommands.Deadline);
            Assert.That(sent, Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
            Assert.That(LeakCheck.Descriptors(destination.Pid), Has.Count.LessThan(limit));
        }
        finally
        {
            strays.ForEach(static s => s.Dispose());
        }
    }

    private static int FreePort()
    {
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        return ((IPEndPoint)listener.LocalEndpoint).Port;
    }
}
