using System.Text.Json.Nodes;
using NUnit.Framework;
using Vmm.Migration.Qmp;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Qmp;

/// <summary>Framing, negotiation, errors and events (qmp 1 to 6), byte for byte where the specification gives the bytes.</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
public sealed class QmpProtocolTests
{
    [Test]
    public void The_greeting_comes_first_and_names_version_and_capabilities()
    {
        using var host = new QmpHost();
        (var ours, var theirs) = Vmm.Core.Interop.Posix.SocketPair();
        _ = host.Server.Serve(theirs);
        using var wire = new QmpWire(ours, Task.CompletedTask);
        string package = $"vmm {typeof(QmpServer).Assembly.GetName().Version!.ToString(3)}";
        Assert.That(wire.ReadLine(), Is.EqualTo(
            $"{{\"QMP\": {{\"version\": {{\"qemu\": {{\"micro\": 3, \"minor\": 1, \"major\": 11}}, \"package\": \"{package}\"}}, \"capabilities\": [\"oob\"]}}}}"));
    }

    [TestCase("{\"execute\":\"stop\",\"id\":1}", "CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'", "1")]
    [TestCase("{\"execute\":\"nope\"}", "CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'", null)]
    [TestCase("{\"exec-oob\":\"query-yank\",\"id\":2}", "GenericError", "QMP input member 'exec-oob' is unexpected", "2")]
    [TestCase("{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"bogus\"]},\"id\":3}", "GenericError",
        "Parameter 'enable[0]' does not accept value 'bogus'", "3")]
    public void Before_negotiation_only_qmp_capabilities_runs(string input, string errorClass, string text, string? id)
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Raw();
        (JsonObject answer, _) = wire.Run(input);
        AssertError(answer, errorClass, text, id);
        Assert.That(wire.Execute("qmp_capabilities")["return"]!.ToJsonString(), Is.EqualTo("{}"), "the session is still in negotiation");
    }

    [Test]
    public void Negotiating_twice_is_refused()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        Assert.That(wire.Error("qmp_capabilities"), Is.EqualTo("CommandNotFound: Capabilities negotiation is already complete, command ignored"));
    }

    [TestCase("\n{ \"execute\": }", "GenericError", "3:14: JSON parse error, expecting value")]
    [TestCase("[1]", "GenericError", "QMP input must be a JSON object")]
    [TestCase("null ", "GenericError", "QMP input must be a JSON object")]
    [TestCase("{\"arguments\":{}}", "GenericError", "QMP input lacks member 'execute'")]
    [TestCase("{\"execute\":5}", "GenericError", "QMP input member 'execute' must be a string")]
    [TestCase("{\"execute\":null}", "GenericError", "QMP input member 'execute' must be a string")]
    [TestCase("{\"execute\":\"stop\",\"foo\":1}", "GenericError", "QMP input member 'foo' is unexpected")]
    [TestCase("{\"execute\":\"stop\",\"arguments\":[]}", "GenericError", "QMP input member 'arguments' must be an object")]
    [TestCase("{\"execute\":\"stop\",\"arguments\":null}", "GenericError", "QMP input member 'arguments' must be an object")]
    [TestCase("{\"exec-oob\":\"query-yank\"}", "GenericError", "QMP input member 'exec-oob' is unexpected")]
    [TestCase("{\"execute\":\"nope\"}", "CommandNotFound", "The command nope has not been found")]
    [TestCase("{\"execute\":\"stop\",\"arguments\":{\"foo\":1}}", "GenericError", "Parameter 'foo' is unexpected")]
    [TestCase("{\"execute\":\"getfd\"}", "GenericError", "Parameter 'fdname' is missing")]
    [TestCase("{\"execute\":\"closefd\",\"arguments\":{\"fdname\":5}}", "GenericError", "Invalid parameter type for 'fdname', expected: string")]
    [TestCase("{\"execute\":\"migrate-set-parameters\",\"arguments\":{\"multifd-channels\":\"x\"}}", "GenericError", "Parameter 'multifd-channels' expects uint64")]
    [TestCase("{\"execute\":\"migrate-set-parameters\",\"arguments\":{\"multifd-channels\":1.5}}", "GenericError", "Parameter 'multifd-channels' expects uint64")]
    [TestCase("{\"execute\":\"migrate-set-parameters\",\"arguments\":{\"max-bandwidth\":-1}}", "GenericError", "Parameter 'max-bandwidth' expects uint64")]
    [TestCase("{\"execute\":\"migrate-set-parameters\",\"arguments\":{\"multifd-channels\":300}}", "GenericError", "Parameter 'multifd-channels' expects uint8_t")]
    [TestCase("{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":[{\"capability\":\"bogus\",\"state\":true}]}}", "GenericError",
        "Parameter 'capability' does not accept value 'bogus'")]
    [TestCase("{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":[{\"capability\":\"events\"}]}}", "GenericError",
        "Parameter 'capabilities[0].state' is missing")]
    [TestCase("{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":[{\"capability\":\"events\",\"state\":1}]}}", "GenericError",
        "Invalid parameter type for 'capabilities[0].state', expected: boolean")]
    [TestCase("{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":{}}}", "GenericError", "Invalid parameter type for 'capabilities', expected: array")]
    public void Bad_input_gets_QEMUs_error(string input, string errorClass, string text)
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        (JsonObject answer, _) = wire.Run(input);
        AssertError(answer, errorClass, text, null);
        Assert.That(wire.Return("query-status")["status"]!.ToString(), Is.EqualTo("prelaunch"), "the connection goes on");
    }

    [TestCase("{\"execute\":\"stop\",\"exec-oob\":\"stop\"}", "QMP input member 'execute' clashes with 'exec-oob'")]
    [TestCase("{\"exec-oob\":\"stop\"}", "The command stop does not support OOB")]
    public void Misused_out_of_band_gets_QEMUs_error(string input, string text)
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client(oob: true);
        AssertError(wire.Run(input).Answer, "GenericError", text, null);
    }

    [TestCase("1")]
    [TestCase("-2.50")]
    [TestCase("18446744073709551616")]
    [TestCase("null")]
    [TestCase("true")]
    [TestCase("\"\\u00E9\\n\"")]
    [TestCase("[1, {\"a\": []}]")]
    [TestCase("{\"x\": {\"y\": 1e400}}")]
    public void Any_id_comes_back_as_it_was_on_success_and_on_error(string id)
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        wire.Send($"{{\"execute\":\"query-name\",\"id\":{id}}}{{\"execute\":\"nope\",\"id\":{id}}}{{\"foo\":1,\"id\":{id}}}");
        for (int i = 0; i < 3; i++) Assert.That(wire.ReadLine(), Does.EndWith($", \"id\": {id}}}"));
    }

    [Test]
    public void Pipelined_commands_are_answered_in_order_wherever_the_bytes_are_split()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        string burst = string.Concat(Enumerable.Range(0, 40).Select(static i => $"{{'execute':'query-name','id':{i}}}"));
        for (int at = 0; at < burst.Length; at += 7) wire.Send(burst[at..Math.Min(at + 7, burst.Length)]);
        for (int i = 0; i < 40; i++) Assert.That(wire.Read()["id"]!.GetValue<int>(), Is.EqualTo(i));
    }

    [Test]
    public void A_control_byte_gets_one_error_without_id_and_the_next_command_runs()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        wire.Send("{\"execute\": \"st\u00ff{\"execute\":\"query-name\",\"id\":7}");
        JsonObject error = wire.Read();
        using (Assert.EnterMultipleScope())
        {
            Assert.That(error["error"]!["desc"]!.ToString(), Does.Contain("stray"));
            Assert.That(error.ContainsKey("id"), Is.False);
            Assert.That(wire.Read()["id"]!.GetValue<int>(), Is.EqualTo(7));
        }
    }

    [Test]
    public void Clients_are_independent_in_negotiation_and_share_events()
    {
        using var host = new QmpHost();
        using QmpWire first = host.Client(), second = host.Client(), silent = host.Raw();
        (JsonObject answer, List<string> events) = first.Run("{\"execute\":\"cont\"}");
        using (Assert.EnterMultipleScope())
        {
            Assert.That(events, Is.EqualTo(new[] { "RESUME" }), "the event precedes the return");
            Assert.That(answer["return"]!.ToJsonString(), Is.EqualTo("{}"));
            Assert.That(QmpWire.Describe(second.Read()), Is.EqualTo("RESUME"));
            Assert.That(silent.Execute("qmp_capabilities").ContainsKey("return"), "a client receives no event before its negotiation");
        }
    }

    [Test]
    public void An_event_has_its_wall_clock_time()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        long before = DateTimeOffset.UtcNow.ToUnixTimeSeconds();
        wire.Send("{\"execute\":\"cont\"}");
        JsonObject message = wire.Read();
        using (Assert.EnterMultipleScope())
        {
            Assert.That(message.ContainsKey("data"), Is.False);
            Assert.That(message["timestamp"]!["seconds"]!.GetValue<long>(), Is.InRange(before, DateTimeOffset.UtcNow.ToUnixTimeSeconds()));
            Assert.That(message["timestamp"]!["microseconds"]!.GetValue<long>(), Is.InRange(0, 999_999));
        }
    }

    [Test]
    public void A_yank_out_of_band_overtakes_a_blocked_dispatcher_and_a_full_queue()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client(oob: true);
        wire.Send("{\"execute\":\"human-monitor-command\",\"arguments\":{\"command-line\":\"migrate tcp:127.0.0.1:1\"},\"id\":\"slow\"}");
        Assert.That(() => host.Engine.Status, Is.EqualTo(Vmm.Migration.Status.MigrationStatus.Setup).After(20_000, 1));
        for (int i = 0; i < QmpSession.MaxQueuedRequests - 1; i++) wire.Send($"{{\"execute\":\"query-status\",\"id\":{i}}}");
        long start = Environment.TickCount64;
        wire.Send("{\"exec-oob\":\"yank\",\"arguments\":{\"instances\":[{\"type\":\"migration\"}]},\"id\":\"oob\"}");
        Assert.That(wire.Read()["id"]!.ToString(), Is.EqualTo("oob"));
        long elapsedMs = Environment.TickCount64 - start;
        using (Assert.EnterMultipleScope())
        {
            Assert.That(elapsedMs, Is.LessThan(1000), "an idle machine takes 50 ms, but this one may be busy");
            Assert.That(host.Engine.Calls, Does.Contain("yank"));
        }
        host.Engine.Move(Vmm.Migration.Status.MigrationStatus.Failed);
        Assert.That(wire.Read()["id"]!.ToString(), Is.EqualTo("slow"));
        for (int i = 0; i < QmpSession.MaxQueuedRequests - 1; i++) Assert.That(wire.Read()["id"]!.GetValue<int>(), Is.EqualTo(i));
    }

    [Test]
    public async Task A_client_that_does_not_read_events_loses_its_connection_and_holds_nobody_up()
    {
        using var host = new QmpHost();
        using QmpWire deaf = host.Client(), good = host.Client();
        // The socket buffer takes some events. Once the bounded queue behind it is full, the server must end the connection.
        for (int i = 0; i < 200_000 && !deaf.Served.IsCompleted && host.Server.ClientCount == 2; i++)
        {
            host.Server.Broadcast("STOP", null);
            good.Read();
        }
        await deaf.Served.WaitAsync(TimeSpan.FromSeconds(20));
        Assert.That(good.Execute("query-name").ContainsKey("return"));
    }

    [Test]
    public async Task Commands_that_wait_when_the_client_closes_its_writing_side_run_in_order_and_are_answered()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        host.Snapshots.Hold = true;
        wire.Send("{\"execute\":\"human-monitor-command\",\"arguments\":{\"command-line\":\"savevm held\"},\"id\":0}");
        Assert.That(host.Snapshots.Entered.Wait(20_000));
        // More than the queue holds, so that the reader still has some of them when it comes to the end.
        int more = QmpSession.MaxQueuedRequests + 5;
        for (int i = 1; i <= more; i++) wire.Send($"{{\"execute\":\"query-name\",\"id\":{i}}}");
        wire.Send("{\"execute\":\"cont\"}");
        wire.CloseWriting();
        host.Snapshots.Release.Set();
        for (int i = 0; i <= more; i++) Assert.That(wire.Read()["id"]!.GetValue<int>(), Is.EqualTo(i));
        await wire.Served.WaitAsync(TimeSpan.FromSeconds(20));
        Assert.That(host.Vm.RunState.IsRunning);
    }

    [Test]
    public async Task Commands_of_a_client_that_has_left_run_too([Values] bool whileOneRuns)
    {
        using var host = new QmpHost();
        QmpWire wire = host.Client();
        if (whileOneRuns)
        {
            host.Snapshots.Hold = true;
            wire.Send("{\"execute\":\"human-monitor-command\",\"arguments\":{\"command-line\":\"savevm held\"}}");
            Assert.That(host.Snapshots.Entered.Wait(20_000));
        }
        wire.Send(string.Concat(Enumerable.Repeat("{\"execute\":\"query-name\"}", 30)) + "{\"execute\":\"cont\"}");
        wire.Dispose();
        host.Snapshots.Release.Set();
        await wire.Served.WaitAsync(TimeSpan.FromSeconds(20));
        Assert.That(host.Vm.RunState.IsRunning);
    }

    [Test]
    public async Task A_client_that_closes_its_writing_side_still_gets_the_answer_to_what_runs()
    {
        using var host = new QmpHost();
        using QmpWire wire = host.Client();
        host.Snapshots.Hold = true;
        wire.Send("{\"execute\":\"human-monitor-command\",\"arguments\":{\"command-line\":\"savevm held\"}}");
        Assert.That(host.Snapshots.Entered.Wait(20_000));
        wire.CloseWriting();
        host.Snapshots.Release.Set();
        Assert.That(wire.ReadLine(), Is.EqualTo("{\"return\": \"\"}"));
        await wire.Served.WaitAsync(TimeSpan.FromSeconds(20));
        Assert.That(host.Snapshots.List(), Has.Count.EqualTo(1));
    }

    private static void AssertError(JsonObject answer, string errorClass, string text, string? id)
    {
        using (Assert.EnterMultipleScope())
        {
            Assert.That(answer["error"]?["class"]?.ToString(), Is.EqualTo(errorClass));
            Assert.That(answer["error"]?["desc"]?.ToString(), Is.EqualTo(text));
            Assert.That(answer["id"]?.ToJsonString(), Is.EqualTo(id));
        }
    }
}
