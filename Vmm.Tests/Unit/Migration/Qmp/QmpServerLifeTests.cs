using System.IO.Pipes;
using System.Text;
using NUnit.Framework;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Migration.Qmp;
using Vmm.Migration.Update;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Qmp;

/// <summary>The server leaves nothing behind when sockets and clients come and go. Not parallel, because the tests count descriptors.</summary>
[TestFixture]
[NonParallelizable]
[System.Runtime.Versioning.SupportedOSPlatform("linux")]
public sealed class QmpServerLifeTests
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(20);

    [Test]
    public void The_socket_is_private_and_removed_on_dispose()
    {
        using var directory = new TempDirectory();
        string path = directory["qmp"];
        using (var host = new QmpHost())
        {
            host.Server.Listen(path);
            Assert.That(File.GetUnixFileMode(path), Is.EqualTo(UnixFileMode.UserRead | UnixFileMode.UserWrite));
            using QmpClient first = QmpClient.Connect(path, s_deadline), second = QmpClient.Connect(path, s_deadline);
            Assert.That(first.Execute("query-name")!["name"]!.ToString() + second.Execute("query-name")!["name"], Is.EqualTo("vm1vm1"));
        }
        Assert.That(Directory.GetFiles(directory.Path), Is.Empty);
    }

    [Test]
    public void A_stale_socket_is_replaced_and_anything_else_is_refused()
    {
        using var directory = new TempDirectory();
        using var host = new QmpHost();
        // A crash leaves a socket file that nobody listens on.
        using (OwnedFd stale = Posix.Socket(Posix.AF_UNIX)) Posix.Bind(stale, Posix.UnixAddress(directory["live"]));
        host.Server.Listen(directory["live"]);
        File.WriteAllText(directory["file"], "precious");
        File.CreateSymbolicLink(directory["link"], directory["elsewhere"]);
        using (Assert.EnterMultipleScope())
        {
            Assert.That(Refusal("live"), Does.Contain("in use"));
            Assert.That(Refusal("file"), Does.Contain("is not a socket"));
            Assert.That(Refusal("link"), Does.Contain("is not a socket"));
            Assert.That(Refusal(new string('x', 120)), Does.Contain("107 bytes"));
            Assert.That(File.ReadAllText(directory["file"]), Is.EqualTo("precious"));
            Assert.That(File.Exists(directory["elsewhere"]), Is.False);
        }
        string Refusal(string name) => Assert.Throws<ConfigurationException>(() => host.Server.Listen(directory[name]))!.Message;
    }

    [Test]
    public void A_file_that_replaced_the_socket_is_left_alone()
    {
        using var directory = new TempDirectory();
        using (var host = new QmpHost())
        {
            host.Server.Listen(directory["qmp"]);
            File.Delete(directory["qmp"]);
            File.WriteAllText(directory["qmp"], "somebody else's");
        }
        Assert.That(File.ReadAllText(directory["qmp"]), Is.EqualTo("somebody else's"));
    }

    [Test]
    public async Task A_thousand_clients_that_connect_and_vanish_leave_no_descriptor()
    {
        using var directory = new TempDirectory();
        using var host = new QmpHost();
        host.Server.Listen(directory["qmp"]);
        using (QmpClient warm = QmpClient.Connect(directory["qmp"], s_deadline)) warm.Execute("query-name");
        // The first asynchronous socket of the process makes the runtime open descriptors of its own.
        await Visit(2);
        await Gone(host);
        List<string> before = LeakCheck.SettledDescriptors();
        for (int i = 0; i < 1000; i++) await Visit(i);
        await Gone(host);
        LeakCheck.NoMoreThan(before);

        async Task Visit(int i)
        {
            using var socket = new System.Net.Sockets.Socket(System.Net.Sockets.AddressFamily.Unix, System.Net.Sockets.SocketType.Stream, 0);
            await socket.ConnectAsync(new System.Net.Sockets.UnixDomainSocketEndPoint(directory["qmp"]));
            if (i % 3 > 0) await socket.SendAsync("{\"execute\":\"qmp_capabilities\"}{\"execute\":\"query-"u8.ToArray());
            if (i % 3 > 1) await socket.ReceiveAsync(new byte[16]);
        }
    }

    [Test]
    public async Task Dispose_ends_clients_in_every_state()
    {
        List<string> before = LeakCheck.SettledDescriptors();
        using var directory = new TempDirectory();
        var host = new QmpHost();
        host.Server.Listen(directory["qmp"]);
        QmpWire blocked = host.Client(), full = host.Client(), silent = host.Raw();
        blocked.Send("{\"execute\":\"human-monitor-command\",\"arguments\":{\"command-line\":\"migrate tcp:h:1\"}}");
        Assert.That(() => host.Engine.Calls.Count, Is.EqualTo(1).After(20_000, 1));
        host.Snapshots.Hold = true;
        full.Send("{\"execute\":\"human-monitor-command\",\"arguments\":{\"command-line\":\"savevm x\"}}");
        for (int i = 0; i < 20; i++) full.Send("{\"execute\":\"query-name\"}");
        Assert.That(host.Snapshots.Entered.Wait(20_000));
        using QmpClient client = QmpClient.Connect(directory["qmp"], s_deadline);
        await Task.Run(host.Dispose).WaitAsync(s_deadline);
        await client.Closed.WaitAsync(s_deadline);
        foreach (QmpWire wire in (QmpWire[])[blocked, full, silent])
        {
            await wire.Served.WaitAsync(s_deadline);
            wire.Dispose();
        }
        client.Dispose();
        LeakCheck.NoMoreThan(before);
    }

    [TestCase(true)]
    [TestCase(false)]
    public async Task When_all_places_are_taken_an_idle_client_gives_way_and_is_told(bool negotiated)
    {
        using var directory = new TempDirectory();
        using var host = new QmpHost();
        host.Server.Listen(directory["qmp"]);
        using QmpWire listener = host.Client();
        var idle = new List<QmpWire>();
        try
        {
            while (idle.Count < QmpServer.MaxClients - 1) idle.Add(negotiated ? host.Client() : host.Raw());
            if (negotiated) Assert.That(listener.Execute("query-name").ContainsKey("return"), "now another client is idle longest");
            using QmpClient operatorsClient = QmpClient.Connect(directory["qmp"], s_deadline);
            Assert.That(operatorsClient.Execute("query-name")!["name"]!.ToString(), Is.EqualTo("vm1"));
            Assert.That(idle[0].ReadLine(), Does.Contain("places were taken, and this client had been idle longest"));
            Assert.That(idle[0].ReadLine(), Is.Null);
            await idle[0].Served.WaitAsync(s_deadline);
            Assert.That(listener.Execute("query-name").ContainsKey("return"), "a client that has negotiated is the last to go");
            Assert.That(idle[1].HasUnread, Is.False);
        }
        finally
        {
            idle.ForEach(static w => w.Dispose());
        }
    }

    [Test]
    public void When_every_client_has_a_command_under_way_the_next_one_is_told_so([Values] bool oneIsDeaf)
    {
        using var directory = new TempDirectory();
        using var host = new QmpHost();
        host.Server.Listen(directory["qmp"]);
        var clients = new List<QmpWire>();
        try
        {
            if (oneIsDeaf)
            {
                // A client that leaves its answers unread counts as idle, however many commands it has sent.
                clients.Add(host.Client());
                byte[] burst = Encoding.ASCII.GetBytes(string.Concat(Enumerable.Repeat("{\"execute\":\"query-migrate-capabilities\"}", 4000)));
                Task sending = Task.Run(() => clients[0].TrySend(burst));
                LeakCheck.WaitFor(() => sending.IsCompleted || clients[0].HasUnread, "no answer came");
            }
            while (clients.Count < QmpServer.MaxClients)
            {
                int calls = host.Engine.Calls.Count + 1;
                clients.Add(host.Client());
                clients[^1].Send("{\"execute\":\"human-monitor-command\",\"arguments\":{\"command-line\":\"migrate tcp:h:1\"}}");
                Assert.That(() => host.Engine.Calls.Count, Is.EqualTo(calls).After(20_000, 1));
            }
            if (oneIsDeaf)
            {
                LeakCheck.WaitFor(() => Connects(directory["qmp"]) is null, "the deaf client kept its place");
                return;
            }
            Assert.That(Connects(directory["qmp"]), Does.Contain("each has a command under way"));
        }
        finally
        {
            clients.ForEach(static w => w.Dispose());
        }
    }

    /// <summary>Null if a client can connect, else why it cannot.</summary>
    private static string? Connects(string path)
    {
        try
        {
            using QmpClient one = QmpClient.Connect(path, s_deadline);
            return null;
        }
        catch (ChannelException e)
        {
            return e.Message;
        }
    }

    [Test]
    public void Clients_that_wait_have_no_thread()
    {
        using var host = new QmpHost();
        using QmpWire first = host.Client(), second = host.Client(oob: true);
        first.Return("query-name");
        LeakCheck.WaitFor(() => !LeakCheck.ThreadNames().Exists(static t => t.Name.StartsWith("qmp-", StringComparison.Ordinal)), "a thread of the control plane is left");
    }

    [Test]
    public async Task A_command_that_disposes_the_server_is_not_waited_for_and_the_rest_ends()
    {
        var updater = new Moq.Mock<IVmUpdater>();
        using var host = new QmpHost(updater: updater.Object);
        using QmpWire wire = host.Client(), other = host.Client();
        host.Server.UpdateOptions = _ => new UpdateOptions();
        updater.Setup(static u => u.UpdateAsync(Moq.It.IsAny<UpdateOptions>(), Moq.It.IsAny<CancellationToken>())).Returns(() =>
        {
            host.Server.Dispose();
            return Task.FromResult(new UpdateResult(1, 0, 0, 0));
        });
        wire.Send($"{{\"execute\":\"{QmpServer.ExtensionPrefix}update\"}}");
        await wire.Served.WaitAsync(s_deadline);
        await other.Served.WaitAsync(s_deadline);
        await Task.Run(host.Server.Dispose).WaitAsync(s_deadline);
        Assert.That(() => host.Server.Listen("/x"), Throws.TypeOf<ObjectDisposedException>());
    }

    [Test]
    public async Task A_job_that_disposes_the_server_is_not_waited_for_and_the_rest_ends()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        host.Snapshots.Saving = host.Server.Dispose;
        wire.Send($"{{\"execute\":\"snapshot-save\",\"arguments\":{{\"job-id\":\"j\",\"tag\":\"t\",\"vmstate\":\"{QmpServer.SnapshotNodeName}\",\"devices\":[\"{QmpServer.SnapshotNodeName}\"]}}}}");
        await wire.Served.WaitAsync(s_deadline);
        await Task.Run(host.Server.Dispose).WaitAsync(s_deadline);
        Assert.That(host.Snapshots.Calls, Has.Count.EqualTo(1));
    }

    [Test]
    public async Task Dispose_ends_a_client_that_does_not_read_its_answers()
    {
        var host = new QmpHost();
        using QmpWire deaf = host.Client();
        byte[] burst = Encoding.ASCII.GetBytes(string.Concat(Enumerable.Repeat("{\"execute\":\"query-migrate-capabilities\"}", 2000)));
        // The server stops reading once its queue is full and its writer waits for room, so the burst may not fit.
        Task sending = Task.Run(() => deaf.TrySend(burst));
        LeakCheck.WaitFor(() => sending.IsCompleted || deaf.HasUnread, "no answer came");
        await Task.Run(host.Dispose).WaitAsync(s_deadline);
        await deaf.Served.WaitAsync(s_deadline);
        await sending.WaitAsync(s_deadline);
    }

    [Test]
    public async Task A_command_whose_file_is_a_FIFO_never_holds_the_server_up()
    {
        using var directory = new TempDirectory();
        Assert.That(Shell.Run("mkfifo", directory["fifo"]).Status, Is.Zero);
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        string arguments = $"{{\"val\":0,\"size\":1048576,\"filename\":\"{directory["fifo"]}\"}}";
        Assert.That(wire.Error("pmemsave", arguments), Does.Contain("Could not open"), "nobody reads");
        using OwnedFd reader = Posix.Open(directory["fifo"], Posix.O_RDONLY | Posix.O_NONBLOCK, 0, out _)!;
        wire.Send($"{{\"execute\":\"pmemsave\",\"arguments\":{arguments}}}");
        LeakCheck.WaitFor(() => Posix.UnreadBytes(reader) == 64 << 10, "the FIFO did not fill");
        await Task.Run(host.Dispose).WaitAsync(s_deadline);
        await wire.Served.WaitAsync(s_deadline);
    }

    [Test]
    public async Task A_pair_of_streams_is_served_too()
    {
        using var host = new QmpHost();
        using var toServer = new AnonymousPipeServerStream(PipeDirection.Out);
        using var fromServer = new AnonymousPipeServerStream(PipeDirection.In);
        Task served = host.Server.Serve(new AnonymousPipeClientStream(PipeDirection.In, toServer.ClientSafePipeHandle),
            new AnonymousPipeClientStream(PipeDirection.Out, fromServer.ClientSafePipeHandle));
        using var reader = new StreamReader(fromServer);
        Assert.That(await reader.ReadLineAsync(), Does.StartWith("{\"QMP\""));
        await toServer.WriteAsync("{\"execute\":\"qmp_capabilities\"}"u8.ToArray());
        Assert.That(await reader.ReadLineAsync(), Is.EqualTo("{\"return\": {}}"));
        toServer.Dispose();
        await served.WaitAsync(s_deadline);
    }

    private static async Task Gone(QmpHost host)
    {
        using var deadline = new CancellationTokenSource(s_deadline);
        while (host.Server.ClientCount > 0)
        {
            deadline.Token.ThrowIfCancellationRequested();
            await Task.Yield();
        }
    }
}
