using System.Net.Sockets;
using System.Text.RegularExpressions;
using Vmm.Core.Errors;
using Vmm.Tests.Support;

namespace Vmm.Tests.Faults;

/// <summary>
/// Runs attempts one after the other in a folder of its own, with VMs of one kind. What survives an attempt is the source of the next one, and a destination whose
/// attempt failed waits for the next one. <see cref="DisposeAsync"/> ends all of it.
/// </summary>
internal sealed partial class Lane(AttemptKind kind, Action<AttemptReport> take) : IAsyncDisposable
{
    private readonly TempDirectory _folder = new();
    private readonly HashSet<string> _killed = [];
    private VmParts? _source, _destination;
    private AttemptReport? _last;
    private long _writes;
    private int _count;

    /// <summary>Runs one attempt.</summary>
    internal async Task Run(AttemptPlan plan)
    {
        AttemptReport report;
        try
        {
            report = await Attempt(plan);
        }
        catch (Exception e) when (e is InvalidOperationException or TimeoutException or OperationCanceledException or IOException or VmmException or SocketException)
        {
            // One process that does not start is a failure of its attempt, not the end of a long run.
            report = new AttemptReport(plan);
            report.Fail($"could not be tried: {e}");
        }
        _last = report;
        take(report);
        // What failed once is not to be blamed for the next failure.
        if (report.Failures.Count > 0) await Forget();
    }

    /// <summary>The process that has the VM now, for its figures; null if none has.</summary>
    internal FaultVm? Vm => _source?.Vm;

    /// <summary>Ends all processes, and looks for files that they leave.</summary>
    public async ValueTask DisposeAsync()
    {
        foreach (VmParts? one in (VmParts?[])[_source, _destination])
            if (one is not null && await End(one) is { } wrong) _last?.Fail(wrong);
        string[] left = [.. Directory.EnumerateFileSystemEntries(_folder.Path).Concat(Directory.EnumerateFileSystemEntries(_folder["vmm"])).Select(static f => Path.GetFileName(f)).Where(IsLeft)];
        if (left.Length > 0) _last?.Fail($"the lane leaves {string.Join(", ", left)}");
        _folder.Dispose();
    }

    /// <summary>Files of the test, of the runtime, and of a process that was killed may stay; a VM that ends leaves nothing.</summary>
    private bool IsLeft(string file) => !Ours().IsMatch(file) && !_killed.Contains(file.Split('.', '-')[0]) && !(_killed.Count > 0 && char.IsAsciiDigit(file[0]));

    [GeneratedRegex(@"^(vmm|\.lock|snapshots-.*|u\d+\..*|.*\.words|dotnet-diagnostic-.*|clr-debug-pipe-.*|v\d+-(edu|dma)|v\d+n\..*|\d+\.(main|cpr)-next)$")]
    private static partial Regex Ours();

    private async Task<AttemptReport> Attempt(AttemptPlan plan)
    {
        if (_source is null)
        {
            _source = await VmParts.Start(_folder.Path, $"v{++_count}", kind, null);
            await Guest.Filled(_source.Vm);
            _writes = 0;
        }
        return plan.Kind switch
        {
            AttemptKind.Update => await Update(plan, _source),
            AttemptKind.Snapshot => await Snapshot(plan, _source),
            _ => await Migrate(plan, _source),
        };
    }

    private async Task<AttemptReport> Migrate(AttemptPlan plan, VmParts source)
    {
        string incoming = plan.Listening switch { Listening.Tcp => "tcp:127.0.0.1:0", Listening.Unix => "unix:", _ => "defer" };
        VmParts destination = _destination ??= await StartDestination(incoming);
        using var attempt = new MigrationAttempt(plan, source, destination);
        AttemptReport report = await attempt.Run(_writes);
        source.Disarm();
        destination.Disarm();
        if (attempt.Survivor != source) report.FailIf(await End(source));
        if (attempt.Survivor != destination && (!attempt.DestinationWaits || report.Failures.Count > 0))
        {
            report.FailIf(await End(destination));
            _destination = null;
        }
        if (attempt.Survivor == destination) _destination = null;
        _source = attempt.Survivor;
        if (_source is { HasLostDevice: true })
        {
            await End(_source);
            _source = null;
        }
        _writes = _source is not null && await Guest.Verify(_source.Vm) is { } verified ? verified["writes"]!.GetValue<long>() : 0;
        return report;
    }

    private async Task<AttemptReport> Update(AttemptPlan plan, VmParts parts)
    {
        using var attempt = new UpdateAttempt(plan, parts);
        AttemptReport report = await attempt.Run(_writes);
        if (attempt.Survivor is null)
        {
            _killed.Add(parts.Vm.Name);
            await parts.DisposeAsync();
            _source = null;
        }
        else if (attempt.Survivor != parts.Vm)
        {
            FaultVm old = parts.Vm;
            parts.Vm = attempt.Survivor;
            if (old.Pid == parts.Vm.Pid) old.Leave();
            else await old.DisposeAsync();
            // A new process begins with the defaults.
            await Deadlines.Set(parts.Vm);
        }
        return report;
    }

    private async Task<AttemptReport> Snapshot(AttemptPlan plan, VmParts parts)
    {
        var attempt = new SnapshotAttempt(plan, parts);
        AttemptReport report = await attempt.Run();
        if (!attempt.HasKilled && !parts.HasLostDevice) return report;
        _killed.Add(parts.Vm.Name);
        await parts.DisposeAsync();
        _source = null;
        return report;
    }

    private async Task<VmParts> StartDestination(string incoming)
    {
        string name = $"v{++_count}";
        return await VmParts.Start(_folder.Path, name, kind, incoming == "unix:" ? $"unix:{_folder[$"{name}.in"]}" : incoming);
    }

    /// <summary>Ends a VM that is not needed any more, in good order.</summary>
    private async Task<string?> End(VmParts parts)
    {
        string? wrong = null;
        if (parts.Vm.IsAlive) wrong = await parts.Vm.Quit();
        else _killed.Add(parts.Vm.Name);
        await parts.DisposeAsync();
        return wrong;
    }

    private async Task Forget()
    {
        foreach (VmParts? one in (VmParts?[])[_source, _destination])
        {
            if (one is null) continue;
            _killed.Add(one.Vm.Name);
            await one.DisposeAsync();
        }
        _source = _destination = null;
    }
}
