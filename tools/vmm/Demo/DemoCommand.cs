using System.Diagnostics;
using System.Text.Json.Nodes;
using Vmm.Core.Kvm;
using Vmm.Migration.Qmp;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Guests;
using Vmm.Tools.Cli.Migrate;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Demo;

/// <summary>
/// <c>vmm demo</c>: migrates a busy VM to another process and then to a real QEMU, and verifies every page. If KVM works, also migrates a real guest,
/// which verifies itself.
/// </summary>
internal sealed class DemoCommand(CliContext context)
{
    private const string VerifyCommand = QmpServer.ExtensionPrefix + "workload-verify";
    private const string Memory = "512M", Workload = "pattern,rate=100M,seed=42,prefill=on";
    private const long MemoryBytes = 512L << 20;
    private const string GuestMemory = "4M"; // Small, because nested KVM is slow.

    // No rate limit; the last pass may take 20 ms.
    private static readonly string[] s_parameters = ["max-bandwidth=0", "downtime-limit=20"];
    private static readonly TimeSpan s_warmUp = TimeSpan.FromSeconds(1), s_guestDeadline = TimeSpan.FromSeconds(60), s_stateDeadline = TimeSpan.FromSeconds(10);

    public async Task<ExitCode> Run()
    {
        DirectoryInfo folder = Directory.CreateTempSubdirectory("vmm-demo-");
        try
        {
            ExitCode code = await ToVmm(folder.FullName);
            if (code == ExitCode.Ok) code = await ToQemu(folder.FullName);
            return code == ExitCode.Ok ? await RealGuest(folder.FullName) : code;
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    private async Task<ExitCode> ToVmm(string folder)
    {
        Heading("A running VM migrates to another vmm process over TCP");
        await using PeerProcess destination = await PeerProcess.StartVmm(context, folder, Path.Combine(folder, "b.qmp"),
            ["--name", "b", "--memory", Memory, "--workload", $"{Workload},state=on,expect=on", "--incoming", "tcp:127.0.0.1:0"]);
        await using PeerProcess source = await PeerProcess.StartVmm(context, folder, Path.Combine(folder, "a.qmp"),
            ["--name", "a", "--memory", Memory, "--workload", $"{Workload},state=on"]);
        context.Out.WriteLine($"source pid {source.Pid}, destination pid {destination.Pid}, {Format.Size(MemoryBytes)} RAM, workload {Workload}");
        await Task.Delay(s_warmUp, context.Interrupted);
        if (await Move(source, destination.IncomingUri) is { } failed) return failed;
        await WaitForState(destination.Monitor, "running");
        long start = Stopwatch.GetTimestamp();
        JsonNode? verdict = await destination.Monitor.Execute(VerifyCommand, null, context.Interrupted);
        long bad = (long)(verdict.Number("bad-pages") ?? -1), checkedPages = (long)(verdict.Number("pages-checked") ?? 0);
        if (bad != 0 || checkedPages == 0)
        {
            context.Note($"{bad} of {checkedPages} pages are wrong on the destination, the first one {verdict?["first-bad"]}");
            return ExitCode.Failed;
        }
        context.Out.WriteLine($"verified: all {checkedPages} pages on the destination, where the workload continues "
            + $"({Format.Milliseconds(Stopwatch.GetElapsedTime(start).TotalMilliseconds)})");
        return ExitCode.Ok;
    }

    private async Task<ExitCode> ToQemu(string folder)
    {
        context.Out.WriteLine();
        if (FindOnPath("qemu-system-x86_64") is not { } qemu)
        {
            context.Out.WriteLine("QEMU is not installed (no qemu-system-x86_64 on PATH), so the demo skips the migration to QEMU");
            return ExitCode.Ok;
        }
        Heading("A running VM migrates to QEMU");
        await using PeerProcess destination = await PeerProcess.StartQemu(context, qemu, Path.Combine(folder, "q.qmp"),
            ["-M", "none", "-m", Memory, "-nodefaults", "-display", "none", "-incoming", "tcp:127.0.0.1:0"]);
        JsonObject listening = await destination.Monitor.Query("query-migrate", context.Interrupted);
        string uri = AddressExtensions.ReadSocketAddress(listening["socket-address"]?[0]).ToString();
        await using PeerProcess source = await PeerProcess.StartVmm(context, folder, Path.Combine(folder, "c.qmp"),
            ["--name", "c", "--memory", Memory, "--workload", Workload]);
        JsonObject version = await destination.Monitor.Query("query-version", context.Interrupted);
        context.Out.WriteLine($"source pid {source.Pid}, destination pid {destination.Pid}: QEMU "
            + $"{version["qemu"]?["major"]}.{version["qemu"]?["minor"]}.{version["qemu"]?["micro"]} at {qemu}");
        await Task.Delay(s_warmUp, context.Interrupted);
        if (await Move(source, uri) is { } failed) return failed;
        await WaitForState(destination.Monitor, "running");
        long start = Stopwatch.GetTimestamp();
        if (await RamComparison.FirstDifference(source.Monitor, destination.Monitor, MemoryBytes, folder, context.Interrupted) is { } at)
        {
            context.Note($"RAM differs at guest address 0x{at:x}");
            return ExitCode.Failed;
        }
        context.Out.WriteLine($"verified: all {MemoryBytes >> 12} pages are the same in QEMU ({Format.Milliseconds(Stopwatch.GetElapsedTime(start).TotalMilliseconds)})");
        return ExitCode.Ok;
    }

    private async Task<ExitCode> RealGuest(string folder)
    {
        context.Out.WriteLine();
        if (KvmPlugin.Probe() is { } missing)
        {
            context.Out.WriteLine($"KVM is not usable, so the demo skips the migration of a real guest: {missing.Message}");
            return ExitCode.Ok;
        }
        Heading("A guest on KVM migrates and verifies its own memory");
        string[] guest = ["--accel", "kvm", "--memory", GuestMemory, "--kernel", GuestImage.BuiltInPrefix + "memcheck"];
        await using PeerProcess destination = await PeerProcess.StartVmm(context, folder, Path.Combine(folder, "g.qmp"), ["--name", "g", .. guest, "--incoming", "tcp:127.0.0.1:0"]);
        await using PeerProcess source = await PeerProcess.StartVmm(context, folder, Path.Combine(folder, "f.qmp"), ["--name", "f", .. guest]);
        context.Out.WriteLine($"source pid {source.Pid}, destination pid {destination.Pid}, {GuestMemory} RAM, guest memcheck");
        await Rounds(source, folder, 2);
        if (await Move(source, destination.IncomingUri) is { } failed) return failed;
        await WaitForState(destination.Monitor, "running");
        MemCheckGuest.Found moved = await Read(destination, folder), found = await Rounds(destination, folder, moved.Rounds + 2);
        if (found.Errors != 0 || found.BackSteps != 0)
        {
            context.Note($"the guest found {found.Errors} wrong words, the first at 0x{found.FirstBad:x}, and its clocks went back {found.BackSteps} times");
            return ExitCode.Failed;
        }
        context.Out.WriteLine($"verified by the guest: no wrong word in {found.Rounds} rounds, and no clock that went back"
            + (found.MaxClockGapNs is { } ns ? $"; the longest gap of its clock was {Format.Milliseconds(ns / 1e6)}" : ""));
        return ExitCode.Ok;
    }

    /// <summary>Waits until the guest has finished a round.</summary>
    private async Task<MemCheckGuest.Found> Rounds(PeerProcess vm, string folder, ulong rounds)
    {
        long start = Stopwatch.GetTimestamp();
        MemCheckGuest.Found found;
        while ((found = await Read(vm, folder)).Rounds <= rounds)
        {
            if (Stopwatch.GetElapsedTime(start) > s_guestDeadline) throw new CliException(ExitCode.Timeout, $"the guest is in round {found.Rounds}, and has not finished round {rounds}");
            // Poll, because a counter in guest memory raises no event.
            await Task.Delay(10, context.Interrupted);
        }
        return found;
    }

    private async Task<MemCheckGuest.Found> Read(PeerProcess vm, string folder)
    {
        string file = Path.Combine(folder, "guest.state");
        await vm.Monitor.Execute("pmemsave", new JsonObject { ["val"] = (long)MemCheckGuest.StateAddress, ["size"] = MemCheckGuest.StateBytes, ["filename"] = file }, context.Interrupted);
        return MemCheckGuest.Found.Of(await File.ReadAllBytesAsync(file, context.Interrupted));
    }

    /// <summary>Migrates and prints the summary; returns null after success.</summary>
    private async Task<ExitCode?> Move(PeerProcess source, string uri)
    {
        MigrateOptions options = MigrateOptions.Parse(uri, s_parameters, [], null);
        ExitCode code = await new MigrateCommand(context, options, new VmTarget(null, null)).Run(source.Monitor);
        return code == ExitCode.Ok ? null : code;
    }

    private async Task WaitForState(IMonitor monitor, string state)
    {
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(context.Interrupted);
        limit.CancelAfter(s_stateDeadline);
        string? now = null;
        try
        {
            while ((now = (await monitor.Query("query-status", limit.Token)).Text("status")) != state) await monitor.WaitForEvent(limit.Token);
        }
        catch (OperationCanceledException e) when (!context.Interrupted.IsCancellationRequested)
        {
            throw new CliException(ExitCode.Timeout, $"the destination is '{now}', expected '{state}'", e);
        }
    }

    private void Heading(string text)
    {
        context.Out.WriteLine(text);
        context.Out.WriteLine(new string('-', text.Length));
    }

    private string? FindOnPath(string program) => (context.GetVariable("PATH") ?? string.Empty).Split(':', StringSplitOptions.RemoveEmptyEntries)
        .Select(folder => Path.Combine(folder, program)).FirstOrDefault(File.Exists);
}
