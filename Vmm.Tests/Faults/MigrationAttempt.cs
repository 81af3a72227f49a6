using System.Diagnostics;
using System.Text.Json.Nodes;
using Vmm.Core.Errors;

namespace Vmm.Tests.Faults;

/// <summary>
/// One migration between two processes under one fault, and the judgement of it: afterwards exactly one of them runs or can be started, and it has the whole
/// guest. The table is in <see cref="Judge"/>.
/// </summary>
internal sealed class MigrationAttempt(AttemptPlan plan, VmParts source, VmParts destination) : IDisposable
{
    private const int SigStop = 19, SigCont = 18, SigKill = 9, LookAgainMs = 100, QuietMs = 150;
    private static readonly TimeSpan s_afterwards = TimeSpan.FromSeconds(5), s_noFault = TimeSpan.FromSeconds(60);

    private readonly AttemptReport _report = new(plan);
    private readonly List<FaultProxy> _proxies = [];
    private readonly Lock _gate = new();
    private readonly List<Timer> _thaws = [];
    private FaultSession _session = null!;
    private long _startedAt;
    private int _sourceEvents, _destinationEvents;

    private FaultVm From => source.Vm;

    private FaultVm To => destination.Vm;

    /// <summary>The side that has the VM after the attempt; null if none has.</summary>
    internal VmParts? Survivor { get; private set; }

    /// <summary>True if the destination waits for another migration, so that it can be used again.</summary>
    internal bool DestinationWaits { get; private set; }

    /// <summary>Runs and judges.</summary>
    /// <param name="writes">The least number of writes that the guest has done.</param>
    internal async Task<AttemptReport> Run(long writes)
    {
        long begun = Stopwatch.GetTimestamp();
        source.Vm.Attempts++;
        destination.Vm.Attempts++;
        _session = new FaultSession(plan.Fault) { Operate = Operate };
        try
        {
            (_sourceEvents, _destinationEvents) = (From.EventCount, To.EventCount);
            string uri = await Prepare();
            _startedAt = Stopwatch.GetTimestamp();
            await From.Execute("migrate", new JsonObject { ["uri"] = uri });
            await Settle();
            _report.FaultHappened = _session.FiredAt != 0;
            if (_report.FaultHappened && plan.Fault.Action == FaultAction.KillSource) From.WaitForEnd();
            if (_report.FaultHappened && plan.Fault.Action == FaultAction.KillDestination) To.WaitForEnd();
            await Judge(writes);
        }
        catch (Exception e) when (e is VmmException or TimeoutException or OperationCanceledException or InvalidOperationException)
        {
            _report.Fail($"{e.GetType().Name}: {e.Message}");
        }
        _report.Total = Stopwatch.GetElapsedTime(begun);
        if (_report.Failures.Count > 0)
            _report.Logs = $"--- source {From.Name}, {await From.State()}, migration {await From.MigrationStatus()}, events {Events(From, _sourceEvents)}\n{From.Log()}\n"
                + $"--- destination {To.Name}, {await To.State()}, migration {await To.MigrationStatus()}, events {Events(To, _destinationEvents)}\n{To.Log()}";
        return _report;
    }

    public void Dispose()
    {
        EndNetwork();
        _session?.Dispose();
    }

    private async Task<string> Prepare()
    {
        bool multifd = plan.Kind == AttemptKind.Multifd;
        await From.Execute("migrate-set-capabilities", FaultVm.Capabilities(
            ("multifd", multifd), ("return-path", plan.ReturnPath), ("switchover-ack", plan.Capabilities.Contains("switchover-ack")),
            ("pause-before-switchover", plan.Capabilities.Contains("pause-before-switchover")), ("validate-uuid", plan.Capabilities.Contains("validate-uuid"))));
        await To.Execute("migrate-set-capabilities", FaultVm.Capabilities(
            ("multifd", multifd), ("return-path", plan.ReturnPath), ("switchover-ack", plan.Capabilities.Contains("switchover-ack"))));
        await From.Execute("migrate-set-parameters", new JsonObject
        {
            ["max-bandwidth"] = plan.MaxBandwidth, ["downtime-limit"] = plan.DowntimeLimitMs, ["zero-page-detection"] = plan.ZeroPageDetection,
        });
        string server = To.IncomingUri;
        if (plan.Listening == Listening.Defer)
        {
            string uri = plan.UsesTcp ? "tcp:127.0.0.1:0" : $"unix:{Path.Combine(destination.Folder, $"{To.Name}.in")}";
            await To.Execute("migrate-incoming", new JsonObject { ["uri"] = uri, ["exit-on-error"] = false });
            JsonNode at = (await To.Execute("query-migrate"))!["socket-address"]![0]!;
            server = plan.UsesTcp ? $"tcp:127.0.0.1:{at["port"]}" : uri;
        }
        bool isUnix = server.StartsWith("unix:", StringComparison.Ordinal);
        var proxy = new FaultProxy(server, isUnix ? Path.Combine(source.Folder, $"{From.Name}-{From.Attempts}.px") : null, () => _session);
        _proxies.Add(proxy);
        source.Arm(_session, Role.SourceDevice, plan.Variant);
        destination.Arm(_session, Role.DestinationDevice, plan.Variant);
        return proxy.Uri;
    }

    /// <summary>Waits until both sides are settled, or until their time is over; then the network ends.</summary>
    private async Task Settle()
    {
        bool sourceIn = await Wait(From, IsSourceSettled, Deadlines.OfSource(plan), static (r, t) => r.SourceTime = t);
        bool destinationIn = await Wait(To, IsDestinationSettled, Deadlines.OfDestination(plan), static (r, t) => r.DestinationTime = t);
        if (!sourceIn) _report.Fail($"no end: the source is {await From.State()}, its migration {await From.MigrationStatus()} after {_report.SourceTime.TotalSeconds:0.0} s");
        if (!destinationIn) _report.Fail($"no end: the destination is {await To.State()}, its migration {await To.MigrationStatus()} after {_report.DestinationTime.TotalSeconds:0.0} s");
        EndNetwork();
        if (sourceIn && destinationIn) return;
        // Afterwards the network is gone for good, which both sides notice.
        long from = Stopwatch.GetTimestamp();
        foreach ((FaultVm vm, Func<Task<bool>> settled) in new (FaultVm, Func<Task<bool>>)[] { (From, IsSourceSettled), (To, IsDestinationSettled) })
            while (!await settled() && Stopwatch.GetElapsedTime(from) < s_afterwards) await vm.Changed(LookAgainMs);
    }

    private async Task<bool> Wait(FaultVm vm, Func<Task<bool>> settled, TimeSpan most, Action<AttemptReport, TimeSpan> note)
    {
        while (true)
        {
            bool isIn = await settled();
            TimeSpan spent = Stopwatch.GetElapsedTime(Math.Max(_startedAt, _session.FiredAt));
            bool isLate = spent > (_session.FiredAt == 0 ? s_noFault : most);
            if (isIn || isLate)
            {
                note(_report, spent);
                return isIn;
            }
            if (plan.Capabilities.Contains("pause-before-switchover") && await From.MigrationStatus() == "pre-switchover")
                await From.Ask("migrate-continue", new JsonObject { ["state"] = "pre-switchover" });
            await vm.Changed(LookAgainMs);
        }
    }

    private async Task<bool> IsSourceSettled() => await From.MigrationStatus() is "completed" or "failed" or "cancelled" or "none" or "dead";

    /// <summary>A destination that has seen nothing of the attempt waits on, and so is settled once the source is.</summary>
    private async Task<bool> IsDestinationSettled()
    {
        if (!To.IsAlive) return true;
        string? last = LastStatus();
        if (last is "completed" or "failed" or "cancelled") return true;
        if (last is not (null or "setup") || !await IsSourceSettled()) return false;
        EndNetwork();
        await To.Changed(QuietMs);
        return LastStatus() == last && await To.State() == "inmigrate";
    }

    private string? LastStatus() => To.EventsSince(_destinationEvents).LastOrDefault(static e => e.Text.StartsWith("MIGRATION ", StringComparison.Ordinal)).Text?["MIGRATION ".Length..];

    /// <summary>Says who may have the VM now, lets that side run, and checks its guest.</summary>
    private async Task Judge(long writes)
    {
        string here = await From.State(), there = await To.State();
        string status = await From.MigrationStatus(), last = LastStatus() ?? "none";
        bool released = status == "completed", isHere = here == "running", isThere = there == "running";
        bool isStopped = plan.Fault.Action == FaultAction.Stop && _report.FaultHappened;
        if (Overlap() is { } overlap && overlap > TimeSpan.Zero) _report.Fail($"both ran for {overlap.TotalMilliseconds:0.0} ms");
        if (here is "silent" || there is "silent") _report.Fail($"a side does not answer: source {here}, destination {there}");
        DestinationWaits = there == "inmigrate" && last == "failed" && !destination.HasDevices;
        if (isHere && isThere)
        {
            _report.Fail("both run");
        }
        else if (isThere)
        {
            if (here is not ("postmigrate" or "dead")) _report.Fail($"the destination runs, and the source is {here}, its migration {status}");
            await Survive(destination, Outcome.Moved, await FinalWrites(writes));
        }
        else if (isHere)
        {
            if (released) _report.Fail("the source runs after it has said completed");
            await Survive(source, Outcome.Stayed, writes);
        }
        else if (there is not ("inmigrate" or "dead" or "silent") && (released || here == "dead"))
        {
            // Held: only an operator may start it, and may do so because the source has let go.
            _report.FailIf(await Operator.Start(To));
            await Survive(destination, Outcome.Forced, await FinalWrites(writes));
        }
        else if (released && there == "dead")
        {
            _report.FailIf(await Operator.Start(From));
            await Survive(source, Outcome.TakenBack, writes);
        }
        else if (released)
        {
            if (plan.ReturnPath) _report.Fail($"the source has let go, and the destination is {there}, its migration {last}");
            _report.FailIf(await Operator.Start(From));
            await Survive(source, Outcome.TakenBack, writes);
        }
        else if (here == "paused" && status == "failed" && !plan.ReturnPath && there is "inmigrate" or "dead")
        {
            // Behind the last byte a source without a return path cannot know whether the destination has it, so it is held.
            if ((await From.Ask("query-status"))?["x-held"] is null) _report.Fail("the source is paused, and not held");
            _report.FailIf(await Operator.Start(From));
            await Survive(source, Outcome.Forced, writes);
        }
        else if (here == "paused" && isStopped)
        {
            _report.FailIf(await Operator.Start(From));
            await Survive(source, Outcome.Stayed, writes);
        }
        else if (here == "dead" && there is "inmigrate" or "dead")
        {
            if (_session.HasPassedConfirmation && there == "inmigrate") _report.Fail("the destination confirmed and gave the VM up");
            _report.Outcome = Outcome.Killed;
        }
        else
        {
            _report.Fail($"nobody runs: source {here}, its migration {status}; destination {there}, its migration {last}");
        }
    }

    private async Task Survive(VmParts side, Outcome outcome, long writes)
    {
        _report.Outcome = outcome;
        Survivor = side;
        _report.FailIf(await Guest.Check(side.Vm, writes));
        bool hitDevice = plan.Fault.IsOfDevice && _report.FaultHappened || plan.Fault.Target is Role.SourceDevice or Role.DestinationDevice;
        if (side.HasDevices && !hitDevice) _report.FailIf(await Guest.CheckDevice(side.Vm, Path.Combine(side.Folder, $"{side.Vm.Name}.words")));
        side.HasLostDevice = hitDevice;
        // A source keeps the figures of its last attempt; a VM that has just arrived has none.
        _report.FailIf(side.Vm.FindLeak(side == source ? $"source of {plan.Kind}" : "arrived"));
        if (DestinationWaits) _report.FailIf(To.FindLeak("waiting"));
    }

    /// <summary>The writes of a source that has stopped for good; its guest must go on from there.</summary>
    private async Task<long> FinalWrites(long writes) => From.IsAlive && await Guest.Verify(From) is { } final ? Math.Max(writes, final["writes"]!.GetValue<long>()) : writes;

    private TimeSpan? Overlap()
    {
        List<(DateTimeOffset From, DateTimeOffset To)> here = Runs(From, _sourceEvents, isRunning: true), there = Runs(To, _destinationEvents, isRunning: false);
        return (from a in here
                from b in there
                select (a.To < b.To ? a.To : b.To) - (a.From > b.From ? a.From : b.From)).DefaultIfEmpty(TimeSpan.Zero).Max();
    }

    private static List<(DateTimeOffset From, DateTimeOffset To)> Runs(FaultVm vm, int mark, bool isRunning)
    {
        var runs = new List<(DateTimeOffset, DateTimeOffset)>();
        DateTimeOffset? since = isRunning ? DateTimeOffset.MinValue : null;
        foreach (LogLine one in vm.EventsSince(mark))
        {
            if (one.Text == "RESUME") since ??= one.At;
            if (one.Text != "STOP" || since is not { } from) continue;
            runs.Add((from, one.At));
            since = null;
        }
        // A dead process ran until its death, which nobody noted.
        if (since is { } still && vm.IsAlive) runs.Add((still, DateTimeOffset.UtcNow));
        return runs;
    }

    private static string Events(FaultVm vm, int mark) => string.Join(", ", vm.EventsSince(mark).Select(static e => $"{e.At:ss.fff} {e.Text}"));

    /// <summary>Called on a pump's thread.</summary>
    private void Operate(Fault fault)
    {
        switch (fault.Action)
        {
            case FaultAction.FreezeSource or FaultAction.FreezeDestination:
                FaultVm frozen = fault.Action == FaultAction.FreezeSource ? From : To;
                frozen.Signal(SigStop);
                lock (_gate) _thaws.Add(new Timer(_ => frozen.Signal(SigCont), null, fault.Ms, Timeout.Infinite));
                break;
            case FaultAction.KillSource:
                From.Signal(SigKill);
                break;
            case FaultAction.KillDestination:
                To.Signal(SigKill);
                break;
            case FaultAction.KillSourceDevice:
                source.KillServer();
                break;
            case FaultAction.KillDestinationDevice:
                destination.KillServer();
                break;
            case FaultAction.Cancel:
                _ = From.Ask("migrate_cancel");
                break;
            case FaultAction.Stop:
                _ = From.Ask("stop", deadlineMs: 10_000);
                break;
        }
    }

    private void EndNetwork()
    {
        lock (_gate)
        {
            foreach (FaultProxy one in _proxies) one.Dispose();
            _proxies.Clear();
            foreach (Timer one in _thaws) one.Dispose();
            if (_thaws.Count > 0)
            {
                From.Signal(SigCont);
                To.Signal(SigCont);
            }
            _thaws.Clear();
        }
    }
}
