using System.Runtime.InteropServices;
using System.Text;
using System.Text.Json.Nodes;
using Microsoft.Extensions.DependencyInjection;
using NUnit.Framework;
using Vmm.Core.Devices;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Migration;
using Vmm.Migration.Engine;
using Vmm.Migration.Qmp;
using Vmm.Migration.Snapshot;
using Vmm.Migration.Update;
using Vmm.Tests.Fakes;

namespace Vmm.Tests.Support;

/// <summary>A VM with a QMP server, a fake migration engine and a fake snapshot store.</summary>
internal sealed class QmpHost : IDisposable
{
    private readonly ServiceProvider _services;

    internal QmpHost(bool incoming = false, bool snapshots = true, string? name = "vm1", IVmUpdater? updater = null)
    {
        var services = new ServiceCollection();
        services.AddVmm().AddQmp();
        services.AddScoped<IMigrationEngine>(_ => Engine);
        if (snapshots) services.AddScoped<ISnapshotService>(_ => Snapshots);
        if (updater is not null) services.AddScoped(_ => updater);
        _services = services.BuildServiceProvider();
        Vm = _services.GetRequiredService<VmFactory>().Create(new VmOptions
        {
            Name = name, IsIncoming = incoming, Uuid = new Guid("12345678-1234-1234-1234-123456789abc"),
            Memory = [new RamBlockOptions { Name = "m", SizeBytes = 1 << 20 }],
        });
        Server = Vm.Services.GetRequiredService<QmpServer>();
    }

    internal FakeMigrationEngine Engine { get; } = new();
    internal FakeSnapshotService Snapshots { get; } = new();
    internal Vm Vm { get; }
    internal QmpServer Server { get; }

    /// <summary>Connects a client that has read the greeting but not sent qmp_capabilities.</summary>
    internal QmpWire Raw()
    {
        (OwnedFd ours, OwnedFd theirs) = Posix.SocketPair();
        Task served = Server.Serve(theirs);
        var wire = new QmpWire(ours, served);
        Assert.That(wire.ReadLine(), Does.StartWith("{\"QMP\": "));
        return wire;
    }

    /// <summary>Connects a client that has sent qmp_capabilities.</summary>
    internal QmpWire Client(bool oob = false)
    {
        QmpWire wire = Raw();
        wire.Send(oob ? "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\"]}}\n" : "{\"execute\":\"qmp_capabilities\"}\n");
        Assert.That(wire.ReadLine(), Is.EqualTo("{\"return\": {}}"));
        return wire;
    }

    public void Dispose()
    {
        Vm.Dispose();
        _services.Dispose();
        Snapshots.Release.Set();
    }
}

/// <summary>Sends bytes to a QMP server and reads lines from it, with a deadline on every read.</summary>
internal sealed class QmpWire(OwnedFd socket, Task served) : IDisposable
{
    private const int DeadlineMs = 20_000;
    private readonly List<byte> _read = [];

    /// <summary>Completes when the server has ended this client's session.</summary>
    internal Task Served => served;

    internal void Send(string text, params SafeHandle[] fds) => Send(Encoding.Latin1.GetBytes(text), fds);

    internal void Send(byte[] bytes, params SafeHandle[] fds)
    {
        ReadOnlySpan<byte> left = bytes;
        while (left.Length > 0)
        {
            int n = Posix.SendWithFds(socket, left, fds, out Vmm.Core.Errors.Errno errno);
            Assert.That(errno, Is.EqualTo(Vmm.Core.Errors.Errno.None));
            left = left[n..];
            fds = [];
        }
    }

    /// <summary>Sends all bytes, or as many as the server takes before it closes the connection.</summary>
    internal void TrySend(ReadOnlySpan<byte> bytes)
    {
        while (bytes.Length > 0 && Posix.SendWithFds(socket, bytes, [], out _) is > 0 and var n) bytes = bytes[n..];
    }

    /// <summary>Reads the next line, without its CRLF; null at the end of the connection.</summary>
    internal string? ReadLine()
    {
        byte[] buffer = new byte[4096];
        while (true)
        {
            int end = _read.IndexOf((byte)'\n');
            if (end >= 0)
            {
                string line = Encoding.ASCII.GetString([.. _read.GetRange(0, end + 1)]);
                _read.RemoveRange(0, end + 1);
                Assert.That(line, Does.EndWith("\r\n"));
                return line[..^2];
            }
            if (Posix.Poll(socket, Posix.POLLIN, null, DeadlineMs, out _) == 0) throw new TimeoutException("no answer from the QMP server");
            int n = Posix.Receive(socket, buffer, 0, out _);
            if (n <= 0) return null;
            _read.AddRange(buffer.AsSpan(0, n));
        }
    }

    internal JsonObject Read() => (JsonObject)JsonNode.Parse(ReadLine() ?? throw new EndOfStreamException("the QMP server hung up"))!;

    /// <summary>Sends a command line and reads its answer. Also returns the names of events that came before the answer.</summary>
    internal (JsonObject Answer, List<string> Events) Run(string text, params SafeHandle[] fds)
    {
        Send(text, fds);
        var events = new List<string>();
        while (true)
        {
            JsonObject message = Read();
            if (!message.ContainsKey("event")) return (message, events);
            events.Add(Describe(message));
        }
    }

    internal JsonObject Execute(string command, string? arguments = null, params SafeHandle[] fds) =>
        Run(arguments is null ? $"{{\"execute\":\"{command}\"}}" : $"{{\"execute\":\"{command}\",\"arguments\":{arguments}}}", fds).Answer;

    internal JsonNode Return(string command, string? arguments = null, params SafeHandle[] fds)
    {
        JsonObject answer = Execute(command, arguments, fds);
        Assert.That(answer.ContainsKey("return"), answer.ToJsonString());
        return answer["return"]!;
    }

    /// <summary>Runs a command that must fail, and returns class and text of the error.</summary>
    internal string Error(string command, string? arguments = null, params SafeHandle[] fds)
    {
        JsonObject answer = Execute(command, arguments, fds);
        Assert.That(answer.ContainsKey("error"), answer.ToJsonString());
        return $"{answer["error"]!["class"]}: {answer["error"]!["desc"]}";
    }

    internal static string Describe(JsonObject message) =>
        message["data"] is JsonObject data ? $"{message["event"]} {string.Join(' ', data.Select(static d => d.Value!.ToString()))}" : $"{message["event"]}";

    /// <summary>Whether unread bytes from the server are there.</summary>
    internal bool HasUnread => Posix.Poll(socket, Posix.POLLIN, null, 0, out _) != 0;

    internal void CloseWriting() => Posix.ShutdownSocket(socket, Posix.SHUT_WR);

    public void Dispose() => socket.Dispose();
}
