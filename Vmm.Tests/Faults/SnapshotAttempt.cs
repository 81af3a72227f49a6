using System.Diagnostics;
using System.Text.Json.Nodes;
using Vmm.Core.Errors;
using Vmm.Migration.Qmp;
using Vmm.Tests.Support;

namespace Vmm.Tests.Faults;

/// <summary>
/// One snapshot, saved or loaded, with one fault of its file: no room, a file that was cut or changed, one that is cut while it is loaded, or the end of the
/// process. Afterwards the VM runs as before or as saved, and the directory holds whole snapshots only.
/// </summary>
internal sealed class SnapshotAttempt(AttemptPlan plan, VmParts parts)
{
    private static readonly TimeSpan s_job = TimeSpan.FromSeconds(20);
    private readonly AttemptReport _report = new(plan);
    private string Folder { get; init; } = Path.Combine(parts.Folder, $"snapshots-{parts.Vm.Name}");

    private FaultVm Vm => parts.Vm;

    /// <summary>The VM's process was killed while it saved.</summary>
    internal bool HasKilled { get; private set; }

    internal async Task<AttemptReport> Run()
    {
        long begun = Stopwatch.GetTimestamp();
        var random = new Random(plan.Seed);
        Vm.Attempts++;
        try
        {
            await Run(random);
            if (!HasKilled) await Check();
        }
        catch (Exception e) when (e is VmmException or TimeoutException or IOException)
        {
            _report.Fail($"{e.GetType().Name}: {e.Message}");
        }
        _report.SourceTime = _report.Total = Stopwatch.GetElapsedTime(begun);
        _report.FaultHappened = true;
        if (_report.Failures.Count > 0) _report.Logs = $"--- {Vm.Name}, {await Vm.State()}\n{Vm.Log(100)}";
        return _report;
    }

    private async Task Run(Random random)
    {
        switch (plan.Variant % 8)
        {
            case 0:
                Expect(null, await Job("snapshot-save", "a"));
                Expect(null, await Job("snapshot-load", "a"));
                break;
            case 1 or 2:
                long room = (long)Math.Exp(Math.Log(4096) + (random.NextDouble() * Math.Log(AttemptPlan.RamBytes / 4096.0)));
                Limit($"{room}");
                string? full = await Job("snapshot-save", "a");
                Limit("unlimited");
                Expect("large", full);
                break;
            case 3 or 4:
                Expect(null, await Job("snapshot-save", "a"));
                Change(random, Stream("a"));
                Expect("", await Job("snapshot-load", "a"));
                break;
            case 5:
                Expect(null, await Job("snapshot-save", "a"));
                await CutWhileItLoads(random);
                break;
            case 6:
                Expect(null, await Job("snapshot-save", "a"));
                await CancelASave(random);
                break;
            default:
                Expect(null, await Job("snapshot-save", "kept"));
                await KillASave(random);
                break;
        }
    }

    /// <summary>The program reads the file twice. If it is cut between, the VM may end in internal-error, but nothing runs on half a state.</summary>
    private async Task CutWhileItLoads(Random random)
    {
        Task<string?> load = Job("snapshot-load", "a");
        GetAhead(random.Next(30));
        using (FileStream file = File.OpenWrite(Stream("a"))) file.SetLength(random.NextInt64(file.Length));
        string? error = await load;
        _report.Outcome = error is null ? Outcome.Done : Outcome.Refused;
        if (await Vm.State() != "internal-error") return;
        Change(random, Stream("a"));
        File.Delete(Stream("a"));
        parts.HasLostDevice = true; // This VM needs a whole snapshot; another takes its place.
    }

    private async Task CancelASave(Random random)
    {
        Task<string?> save = Job("snapshot-save", "b");
        GetAhead(random.Next(20));
        await Vm.Ask("job-cancel", new JsonObject { ["id"] = "snapshot-save-b" });
        _report.Outcome = await save is null ? Outcome.Done : Outcome.Refused;
    }

    private async Task KillASave(Random random)
    {
        Task<string?> save = Job("snapshot-save", "torn");
        GetAhead(random.Next(30));
        Vm.Signal(9);
        try
        {
            await save;
        }
        catch (VmmException)
        {
            // The process ended before its answer.
        }
        HasKilled = true;
        await Vm.DisposeAsync();
        // A new process of the same snapshots shows them whole and goes on from one.
        await using VmParts next = await VmParts.Start(parts.Folder, $"{Vm.Name}n", AttemptKind.Snapshot, null, Vm.Name);
        var again = new SnapshotAttempt(plan, next) { Folder = Folder };
        string? torn = Directory.Exists(Path.Combine(Folder, "torn")) ? await again.Job("snapshot-load", "torn") : null;
        if (torn is not null) _report.Fail($"a snapshot with a name is not whole: {torn}");
        Expect(null, await again.Job("snapshot-load", "kept"));
        _report.FailIf(await Guest.Check(next.Vm, 0));
        _report.Outcome = Outcome.Killed;
    }

    private async Task Check()
    {
        string state = await Vm.State();
        if (state == "internal-error" && parts.HasLostDevice) return;
        if (state != "running")
        {
            _report.Fail($"the VM is {state}");
            return;
        }
        _report.FailIf(await Guest.Check(Vm, 0));
        _report.FailIf(Vm.FindLeak("running"));
        if (!Directory.Exists(Folder)) return;
        string[] aside = [.. Directory.EnumerateFileSystemEntries(Folder, ".*")];
        if (aside.Length > 0) _report.Fail($"left behind: {string.Join(", ", aside.Select(Path.GetFileName))}");
        Directory.Delete(Folder, recursive: true);
    }

    /// <param name="error">Null when the job must succeed, else a part of the error that it must have.</param>
    /// <param name="found">What it said.</param>
    private void Expect(string? error, string? found)
    {
        _report.Outcome = found is null ? Outcome.Done : Outcome.Refused;
        if (error is null && found is not null) _report.Fail($"a good snapshot fails: {found}");
        if (error is not null && found is null) _report.Fail("a bad snapshot succeeds");
        if (error is not null && found is not null && !found.Contains(error, StringComparison.OrdinalIgnoreCase)) _report.Fail($"the error does not say '{error}': {found}");
    }

    /// <summary>Runs a snapshot job to its end; returns its error, or null.</summary>
    private async Task<string?> Job(string command, string tag)
    {
        string id = $"{command}-{tag}";
        await Vm.Execute(command, new JsonObject
        {
            ["job-id"] = id, ["tag"] = tag, ["devices"] = new JsonArray(QmpServer.SnapshotNodeName), ["vmstate"] = QmpServer.SnapshotNodeName,
        });
        using var limit = new CancellationTokenSource(s_job);
        while (true)
        {
            JsonObject? job = (await Vm.Execute("query-jobs") as JsonArray)?.OfType<JsonObject>().FirstOrDefault(j => j["id"]?.ToString() == id);
            if (job?["status"]?.ToString() == "concluded")
            {
                await Vm.Execute("job-dismiss", new JsonObject { ["id"] = id });
                return job["error"]?.ToString();
            }
            if (limit.IsCancellationRequested) throw new TimeoutException($"{command} does not end");
            await Vm.Changed(100);
        }
    }

    private string Stream(string tag) => Path.Combine(Folder, tag, "vmstate");

    /// <summary>Sets the limit on the size of the process's files; without room a write fails as on a full disk.</summary>
    private void Limit(string bytes)
    {
        (int status, _, string errors) = Shell.Run("prlimit", "--pid", $"{Vm.Pid}", $"--fsize={bytes}:");
        Assert.That(status, Is.Zero, errors);
    }

    /// <summary>Cuts a file or changes one byte of it.</summary>
    private static void Change(Random random, string path)
    {
        using FileStream file = File.Open(path, FileMode.Open);
        if (file.Length == 0) return;
        long at = random.NextInt64(file.Length);
        if (random.Next(2) == 0)
        {
            file.SetLength(at);
            return;
        }
        file.Position = at;
        int was = file.ReadByte();
        file.Position = at;
        file.WriteByte((byte)(was ^ (1 << random.Next(8))));
    }

    /// <summary>Lets the job get ahead by a time that the seed decides.</summary>
    private static void GetAhead(int ms)
    {
        using Core.Interop.OwnedFd never = Core.Interop.Posix.EventFd();
        Core.Interop.Posix.Poll(never, Core.Interop.Posix.POLLIN, null, ms, out _);
    }
}
