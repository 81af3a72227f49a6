using System.Diagnostics;
using System.Text.Json.Nodes;
using System.Text.RegularExpressions;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Migration.Qmp;
using Vmm.Tools.Cli.Client;

namespace Vmm.Tests.Faults;

/// <summary>
/// One live update under one fault. A script stands for the new program: it puts a proxy in front of each of the new process's two sockets, or fails in another way.
/// Afterwards one of the two processes runs the VM, or the fault has killed the only one that had it.
/// </summary>
internal sealed partial class UpdateAttempt(AttemptPlan plan, VmParts parts) : IDisposable
{
    private const int SigStop = 19, SigCont = 18, SigKill = 9;
    private static readonly TimeSpan s_end = TimeSpan.FromSeconds(10), s_limit = TimeSpan.FromSeconds(40), s_silence = TimeSpan.FromSeconds(150);

    private readonly AttemptReport _report = new(plan);
    private readonly List<FaultProxy> _proxies = [];
    private readonly Lock _gate = new();
    private readonly List<Timer> _thaws = [];
    private FaultSession _session = null!;
    private string _pidFile = "";

    private enum Way
    {
        /// <summary>Through proxies.</summary>
        Proxied,
        /// <summary>The new program ends at once.</summary>
        Ends,
        /// <summary>The new program never listens.</summary>
        Silent,
        /// <summary>The process replaces itself.</summary>
        Exec,
        /// <summary>The process would replace itself by a program that fails.</summary>
        ExecEnds,
    }

    private FaultVm Old => parts.Vm;

    private Way Chosen => (plan.Variant % 40) switch { 0 => Way.Ends, 1 => Way.Silent, 2 or 3 => Way.Exec, 4 => Way.ExecEnds, _ => Way.Proxied };

    /// <summary>The side that has the VM after the attempt.</summary>
    internal FaultVm? Survivor { get; private set; }

    internal async Task<AttemptReport> Run(long writes)
    {
        long begun = Stopwatch.GetTimestamp();
        FaultVm old = Old;
        old.Attempts++;
        _session = new FaultSession(Chosen == Way.Proxied ? plan.Fault : Fault.None) { Operate = Operate };
        try
        {
            JsonNode? result = null;
            string? error = null;
            try
            {
                var arguments = new JsonObject { ["timeout-ms"] = Chosen == Way.Silent ? 3000 : 12_000, ["exec"] = Chosen is Way.Exec or Way.ExecEnds };
                if (Chosen != Way.Exec) arguments["binary"] = Prepare();
                result = await old.Execute("__io.github.vmm_update", arguments, plan.Fault.IsSilent ? s_silence : s_limit);
            }
            catch (Exception e) when (e is VmmException or TimeoutException)
            {
                error = e.Message;
                if (e is TimeoutException) _report.Fail("the update does not end");
            }
            _report.SourceTime = Stopwatch.GetElapsedTime(_session.FiredAt == 0 ? begun : _session.FiredAt);
            _report.FaultHappened = _session.FiredAt != 0;
            EndNetwork();
            await Judge(result, error, writes);
        }
        catch (Exception e) when (e is VmmException or TimeoutException or OperationCanceledException or InvalidOperationException or IOException)
        {
            _report.Fail($"{e.GetType().Name}: {e.Message}");
        }
        _report.Total = Stopwatch.GetElapsedTime(begun);
        if (_report.Failures.Count > 0) _report.Logs = $"--- both processes, the old one {await old.State()}\n{old.Log(100)}";
        return _report;
    }

    public void Dispose()
    {
        EndNetwork();
        _session?.Dispose();
    }

    private async Task Judge(JsonNode? result, string? error, long writes)
    {
        if (Chosen == Way.Exec && result is null && Old.IsAlive)
        {
            // It cannot answer; its successor has its pid and its socket.
            FaultVm again = await Old.Successor(Old.Pid, s_limit);
            await Survive(again, Outcome.Moved, writes);
            return;
        }
        if (result?["pid"]?.GetValue<int>() is { } pid)
        {
            if (!SpinWait.SpinUntil(() => !Old.IsAlive, s_end)) _report.Fail("the old process does not end after the update");
            else if (Old.ExitCode is not (null or 0)) _report.Fail($"the old process ended with exit code {Old.ExitCode}");
            await Survive(await Old.Successor(pid, s_end), Outcome.Moved, writes);
            return;
        }
        int next = File.Exists(_pidFile) && int.TryParse(await File.ReadAllTextAsync(_pidFile), out int written) ? written : 0;
        if (_report.FaultHappened && plan.Fault.Action == FaultAction.KillSource) Old.WaitForEnd();
        string here = await Old.State();
        if (here is "running" or "paused")
        {
            if (next != 0 && !SpinWait.SpinUntil(() => !IsAlive(next), s_end)) _report.Fail($"the new process {next} outlives its failed update");
            if (here == "paused" && plan.Fault.Action == FaultAction.Stop) await Old.Execute("cont");
            await Survive(Old, Outcome.Stayed, writes);
            return;
        }
        if (next != 0 && here is "dead" or "postmigrate" or "silent")
        {
            // The new one may be about to start, or to end because its VM has not arrived.
            FaultVm? held = null;
            SpinWait.SpinUntil(() => !IsAlive(next) || (held = Find(next)) is not null, s_end);
            if (held is not null)
            {
                if (await held.State() != "running") _report.FailIf(await Operator.Start(held));
                await Survive(held, here == "dead" ? Outcome.Moved : Outcome.Forced, writes);
                return;
            }
        }
        if (here == "dead" && plan.Fault.Action == FaultAction.KillSource)
        {
            if (_session.HasPassedConfirmation) _report.Fail($"process {next} confirmed and gave the VM up");
            _report.Outcome = Outcome.Killed;
            return;
        }
        if (plan.Fault.Action == FaultAction.KillDestination && here == "postmigrate")
        {
            // The process that had the VM was killed. It may have run the guest in the memory that both share, so the old one must not.
            if (await Operator.Start(Old) is not { } refused || !refused.Contains("handed to another process", StringComparison.Ordinal)) _report.Fail("the old process runs what it has handed over");
            _report.Outcome = Outcome.Killed;
            return;
        }
        _report.Fail($"nobody runs: the old process is {here}, its migration {await Old.MigrationStatus()}; the new one, {next}, {(IsAlive(next) ? "lives" : "is gone")}; the update said '{error}'");
    }

    /// <summary>Connects to a new process that has the VM, at the VM's place or at its own.</summary>
    private FaultVm? Find(int pid)
    {
        try
        {
            // Until it runs the VM, it listens at a place of its own.
            string own = Path.Combine(parts.Folder, "vmm", $"{pid}.next");
            FaultVm next = Old.Successor(pid, TimeSpan.Zero, File.Exists(own) ? own : null).GetAwaiter().GetResult();
            if (next.State().GetAwaiter().GetResult() is not ("inmigrate" or "dead" or "silent")) return next;
            next.DisposeAsync().AsTask().GetAwaiter().GetResult();
        }
        catch (Exception e) when (e is VmmException or TimeoutException)
        {
            // It has not taken the place over yet.
        }
        return null;
    }

    private async Task Survive(FaultVm vm, Outcome outcome, long writes)
    {
        Survivor = vm;
        _report.Outcome = outcome;
        if (await vm.State() is var state && state != "running") _report.Fail($"the VM is {state}");
        _report.FailIf(await Guest.Check(vm, writes));
        _report.FailIf(vm.FindLeak(vm == Old ? $"source of {plan.Kind}" : "arrived"));
        string[] left = [];
        SpinWait.SpinUntil(() => (left = [.. Files().Where(f => !Expected().IsMatch(f) && !parts.Reported.Contains(f))]).Length == 0, s_end);
        parts.Reported.UnionWith(left);
        if (left.Length > 0) _report.Fail($"files are left: {string.Join(", ", left)}; the new process is {(File.Exists(_pidFile) ? File.ReadAllText(_pidFile).Trim() : "none")}");
    }

    /// <summary>What VMs keep in their directory, and the sockets that only stand behind the proxies. The files of an update begin with a pid.</summary>
    [GeneratedRegex(@"^(\.lock|v\d+n?\.(json|qmp)|\d+\.(main|cpr)-next)$")]
    private static partial Regex Expected();

    private IEnumerable<string> Files() => Directory.EnumerateFileSystemEntries(Path.Combine(parts.Folder, "vmm")).Select(static f => Path.GetFileName(f));

    private string Prepare()
    {
        string at = Path.Combine(parts.Folder, $"u{Old.Attempts}");
        (string file, string[] prefix) = PeerProcess.Self();
        string vmm = string.Join(' ', ((string[])[file, .. prefix]).Select(static p => $"'{p}'"));
        _pidFile = $"{at}.pid";
        File.Delete(_pidFile);
        string body = Chosen switch
        {
            Way.Ends => "exit 3",
            Way.ExecEnds => "exit 3",
            Way.Silent => "exec sleep 30",
            _ => $$"""
                for a; do shift
                  for c in main cpr; do
                    case "$a" in *"\"channel-type\":\"$c\""*)
                      p=${a#*'"path":"'}; p=${p%%'"'*}
                      ln '{{at}}'.$c "$p" || exit 9
                      a="${a%%"$p"*}$p-next${a#*"$p"}" ;;
                    esac
                  done
                  set -- "$@" "$a"
                done
                exec {{vmm}} "$@"
                """,
        };
        string script = $"{at}.sh";
        File.WriteAllText(script, $"#!/bin/sh\necho $$ > '{_pidFile}.new'; mv '{_pidFile}.new' '{_pidFile}'\n{body}\n");
        File.SetUnixFileMode(script, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        if (Chosen == Way.Proxied)
        {
            string place = Path.Combine(parts.Folder, "vmm", $"{Old.Pid}");
            _proxies.Add(new FaultProxy($"unix:{place}.main-next", $"{at}.main", () => _session, Role.Main));
            _proxies.Add(new FaultProxy($"unix:{place}.cpr-next", $"{at}.cpr", () => _session, Role.Cpr));
        }
        return script;
    }

    private static bool IsAlive(int pid) => pid != 0 && Lab.LabOpenFiles.IsAlive(pid);

    /// <summary>Called on a pump's thread.</summary>
    private void Operate(Fault fault)
    {
        int next = File.Exists(_pidFile) && int.TryParse(File.ReadAllText(_pidFile), out int pid) ? pid : 0;
        switch (fault.Action)
        {
            case FaultAction.FreezeSource:
                Old.Signal(SigStop);
                Thaw(fault.Ms, () => Old.Signal(SigCont));
                break;
            case FaultAction.FreezeDestination when next != 0:
                Posix.Kill(next, SigStop);
                Thaw(fault.Ms, () => Posix.Kill(next, SigCont));
                break;
            case FaultAction.KillSource:
                Old.Signal(SigKill);
                break;
            case FaultAction.KillDestination when next != 0:
                Posix.Kill(next, SigKill);
                break;
            case FaultAction.Cancel:
                _ = Old.Ask("migrate_cancel");
                break;
            case FaultAction.Stop:
                _ = Old.Ask("stop", deadlineMs: 10_000);
                break;
        }
    }

    private void Thaw(int ms, Action thaw)
    {
        lock (_gate) _thaws.Add(new Timer(_ => thaw(), null, ms, Timeout.Infinite));
    }

    private void EndNetwork()
    {
        lock (_gate)
        {
            foreach (FaultProxy one in _proxies) one.Dispose();
            _proxies.Clear();
        }
    }
}
