using System.Text.Json.Nodes;
using Vmm.Tools.Cli;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Fakes;

/// <summary>A VM that answers QMP commands from a script. It gives the answers to one command in order and repeats the last one.</summary>
internal sealed class FakeMonitor : IMonitor
{
    private readonly Dictionary<string, Queue<Func<JsonObject?, JsonNode?>>> _answers = new(StringComparer.Ordinal);

    internal FakeMonitor()
    {
        On("query-status", """{"status": "running", "running": true}""");
        On("query-name", """{"name": "vm1"}""");
        On("query-version", """{"qemu": {"major": 11, "minor": 1, "micro": 3}, "package": "vmm 0.1.0"}""");
        On("query-migrate-capabilities", """[{"capability": "return-path", "state": false}, {"capability": "events", "state": false}]""");
        On("query-migrate-parameters", """{"max-bandwidth": 134217728, "downtime-limit": 300, "mode": "normal", "direct-io": false}""");
        foreach (string plain in new[] { "migrate-set-capabilities", "migrate-set-parameters", "migrate", "migrate_cancel", "stop", "cont", "quit" }) On(plain, "{}");
        On("query-migrate", "{}");
    }

    /// <summary>The commands that came, with their arguments, in order.</summary>
    internal List<string> Log { get; } = [];

    internal bool IsDisposed { get; private set; }

    /// <summary>Replaces the answers to a command.</summary>
    internal FakeMonitor On(string command, params string[] answers)
    {
        _answers[command] = new(answers.Select(static a => (Func<JsonObject?, JsonNode?>)(_ => JsonNode.Parse(a))));
        return this;
    }

    internal FakeMonitor Fail(string command, string text)
    {
        _answers[command] = new([_ => throw new MonitorException("GenericError", text)]);
        return this;
    }

    /// <summary>Runs code each time the command comes, before the answer that the script already has.</summary>
    internal FakeMonitor Before(string command, Action act)
    {
        Queue<Func<JsonObject?, JsonNode?>> rest = _answers[command];
        _answers[command] = new(rest.Select(r => (Func<JsonObject?, JsonNode?>)(a => { act(); return r(a); })));
        return this;
    }

    /// <summary>Accepts snapshot-save and lists its job: first as running, then as concluded with the members in <paramref name="more"/>.</summary>
    internal FakeMonitor WithJob(string more)
    {
        string id = string.Empty;
        _answers["snapshot-save"] = new([a => { id = a!["job-id"]!.ToString(); return new JsonObject(); }]);
        _answers["job-dismiss"] = new([_ => new JsonObject()]);
        JsonNode? Job(string status, string rest) => JsonNode.Parse($$"""[{"id": "{{id}}", "status": "{{status}}"{{rest}}}]""");
        _answers["query-jobs"] = new([_ => Job("running", string.Empty), _ => Job("concluded", more)]);
        return this;
    }

    public Task<JsonNode?> Execute(string command, JsonObject? arguments, CancellationToken cancel)
    {
        Log.Add(arguments is null ? command : $"{command} {arguments.ToJsonString()}");
        if (!_answers.TryGetValue(command, out var queue)) throw new MonitorException("CommandNotFound", $"The command {command} has not been found");
        return Task.FromResult((queue.Count > 1 ? queue.Dequeue() : queue.Peek())(arguments));
    }

    public Task RequestOutOfBand(string command)
    {
        Log.Add($"out-of-band {command}");
        return Task.CompletedTask;
    }

    public Task WaitForEvent(CancellationToken cancel) => Task.CompletedTask;

    public Task WaitForEnd(TimeSpan deadline) => Task.CompletedTask;

    public ValueTask DisposeAsync()
    {
        IsDisposed = true;
        return ValueTask.CompletedTask;
    }

    /// <summary>Runs a command line against this VM.</summary>
    internal Task<CliResult> Run(string[] arguments, CancellationToken interrupted = default) => RunAlone([.. arguments, "--qmp", "/fake"], interrupted);

    /// <summary>Runs a command line that takes no VM.</summary>
    internal async Task<CliResult> RunAlone(string[] arguments, CancellationToken interrupted = default)
    {
        using var output = new StringWriter();
        using var error = new StringWriter();
        int code = await CliRoot.Invoke(arguments, new CliContext
        {
            Out = output, Error = error, Interrupted = interrupted, Connect = (_, _) => Task.FromResult<IMonitor>(this), GetVariable = static _ => null,
        });
        return new CliResult((ExitCode)code, output.ToString(), error.ToString());
    }
}

/// <summary>Exit code and output of a command line.</summary>
internal sealed record CliResult(ExitCode Code, string Out, string Error);
