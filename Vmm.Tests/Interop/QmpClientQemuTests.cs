using System.Text.Json.Nodes;
using NUnit.Framework;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Migration.Qmp;
using Vmm.Tests.Support;

namespace Vmm.Tests.Interop;

[TestFixture]
[Category(QemuVersions.Category)]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
public sealed class QmpClientQemuTests
{
    [TestCaseSource(typeof(QemuVersions), nameof(QemuVersions.All))]
    public async Task The_client_drives_a_real_QEMU(string version)
    {
        using var qemu = new QemuProcess(version, 0, extra: "-S");
        QmpClient client = qemu.Qmp;
        Assert.That((int)client.Greeting["version"]!["qemu"]!["major"]!, Is.GreaterThanOrEqualTo(7));
        JsonNode? status = client.Execute("query-status");
        Assert.That((string?)status!["status"], Is.EqualTo("prelaunch"));

        Task<QmpEvent> resume = client.WaitForEventAsync("RESUME");
        client.Execute("cont");
        Assert.That((await resume).Timestamp, Is.Not.Null.And.GreaterThan(DateTimeOffset.UnixEpoch));

        var error = Assert.Throws<QmpErrorException>(() => client.Execute("nope"));
        using (Assert.EnterMultipleScope())
        {
            Assert.That(error!.QmpClass, Is.EqualTo(QmpErrorClass.CommandNotFound));
            Assert.That(error.Message, Is.EqualTo("The command nope has not been found"));
        }
        Assert.That(client.Execute("query-qmp-schema")!.AsArray(), Has.Count.GreaterThan(500));
    }

    [TestCaseSource(typeof(QemuVersions), nameof(QemuVersions.All))]
    public async Task Overlapping_commands_get_their_own_answers(string version)
    {
        using var qemu = new QemuProcess(version, 0, extra: "-S");
        QmpClient client = qemu.Qmp;
        Task<JsonNode?>[] all = [.. Enumerable.Range(0, 60).Select(i => client.ExecuteAsync(i % 2 == 0 ? "query-status" : "query-version"))];
        JsonNode?[] answers = await Task.WhenAll(all);
        for (int i = 0; i < answers.Length; i++) Assert.That(answers[i]!.AsObject().ContainsKey(i % 2 == 0 ? "status" : "qemu"), $"answer {i}");
        Assert.That((await client.ExecuteAsync("query-yank", outOfBand: true))!.AsArray(), Is.Not.Null);
    }

    [TestCaseSource(typeof(QemuVersions), nameof(QemuVersions.All))]
    public async Task A_descriptor_reaches_QEMU_and_quit_ends_the_connection(string version)
    {
        using var qemu = new QemuProcess(version, 0, extra: "-S");
        QmpClient client = qemu.Qmp;
        (OwnedFd read, OwnedFd write) = Posix.Pipe();
        using (read)
        using (write)
        {
            await client.ExecuteAsync("getfd", new JsonObject { ["fdname"] = "f1" }, write);
            await client.ExecuteAsync("closefd", new JsonObject { ["fdname"] = "f1" });
            await Assert.ThrowsAsync<QmpErrorException>(() => client.ExecuteAsync("closefd", new JsonObject { ["fdname"] = "f1" }));
        }
        await client.ExecuteAsync("quit");
        await client.Closed.WaitAsync(TimeSpan.FromSeconds(30));
        Assert.Throws<ChannelException>(() => client.Execute("query-status"));
    }

    [TestCaseSource(typeof(QemuVersions), nameof(QemuVersions.All))]
    public void A_busy_or_absent_server_is_named_within_the_deadline(string version)
    {
        using var qemu = new QemuProcess(version, 0, extra: "-S");
        ChannelException busy = Assert.Throws<ChannelException>(() => QmpClient.Connect(qemu.File("qmp"), TimeSpan.FromMilliseconds(200)))!;
        ChannelException absent = Assert.Throws<ChannelException>(() => QmpClient.Connect(qemu.File("nothing"), TimeSpan.FromSeconds(5)))!;
        using (Assert.EnterMultipleScope())
        {
            Assert.That(busy.Errno, Is.EqualTo(Errno.ETIMEDOUT));
            Assert.That(busy.Message, Does.Contain(qemu.File("qmp")));
            Assert.That(absent.Errno, Is.EqualTo(Errno.ENOENT));
        }
    }
}
