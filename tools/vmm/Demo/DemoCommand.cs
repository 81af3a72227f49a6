using System.Diagnostics;
using System.Text.Json.Nodes;
using Vmm.Migration.Qmp;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Migrate;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Demo;

/// <summary><c>vmm demo</c>: a busy VM moves to another process, then into a real QEMU; every page is checked.</summary>
internal sealed class DemoCommand(CliContext context)
{
    private const string VerifyCommand = QmpServer.ExtensionPrefix + "workload-verify";
    private const string Memory = "512M", Workload = "pattern,rate=100M,seed=42,prefill=on";
    private const long MemoryBytes = 512L << 20;

    // As fast as it goes, and so many rounds that what is left takes no longer than this.
    private static readonly string[] s_parameters = ["max-bandwidth=0", "downtime-limit=20"];
    private static readonly TimeSpan s_warmUp = TimeSpan.FromSeconds(1);

    public async Task<ExitCode> Run()
    {
        DirectoryInfo folder = Directory.CreateTempSubdirectory("vmm-demo-");
        try
        {
            ExitCode code = await ToVmm(folder.FullName);
            return code != ExitCode.Ok ? code : await ToQemu(folder.FullName);
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    private async Task<ExitCode> ToVmm(string folder)
    {
        Heading("A running VM moves to another vmm process over TCP");
        await using PeerProcess destination = await PeerProcess.StartVmm(context, folder, Path.Combine(folder, "b.qmp"),
            ["--name", "b", "--memory", Memory, "--workload", $"{Workload},state=on", "--incoming", "tcp:127.0.0.1:0"]);
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
            context.Note($"{bad} of {checkedPages} pages are wrong on the destination, the first is {verdict?["first-bad"]}");
            return ExitCode.Failed;
        }
        context.Out.WriteLine($"verified: all {checkedPages} pages on the destination, where the workload goes on "
            + $"({Format.Milliseconds(Stopwatch.GetElapsedTime(start).TotalMilliseconds)})");
        return ExitCode.Ok;
    }

    private async Task<ExitCode> ToQemu(string folder)
    {
        context.Out.WriteLine();
        if (FindOnPath("qemu-system-x86_64") is not { } qemu)
        {
            context.Out.WriteLine("QEMU is not installed (no qemu-system-x86_64 on PATH), so the move into QEMU is left out");
            return ExitCode.Ok;
        }
        Heading("A running VM moves into QEMU");
        await using PeerProcess destination = await PeerProcess.StartQemu(context, qemu, Path.Combine(folder, "q.qmp"),
            ["-M", "none", "-m", Memory, "-nodefaults", "-display", "none", "-incoming", "tcp:127.0.0.1:0"]);
        JsonObject listening = await destination.Monitor.Query("query-migrate", context.Interrupted);
        string uri = AddressExtensions.ReadSocketAddress(listening["socket-address"]?[0]).ToUri().ToString();
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

    /// <summary>Migrates and prints the summary; null when it worked.</summary>
    private async Task<ExitCode?> Move(PeerProcess source, string uri)
    {
        MigrateOptions options = MigrateOptions.Parse(uri, s_parameters, [], null);
        ExitCode code = await new MigrateCommand(context, options, new VmTarget(null, null)).Run(source.Monitor);
        return code == ExitCode.Ok ? null : code;
    }

    private async Task WaitForState(IMonitor monitor, string state)
    {
        long start = Stopwatch.GetTimestamp();
        string? now;
        while ((now = (await monitor.Query("query-status", context.Interrupted)).Text("status")) != state)
        {
            if (Stopwatch.GetElapsedTime(start) > TimeSpan.FromSeconds(10)) throw new CliException(ExitCode.Timeout, $"the destination is '{now}' and not '{state}'");
            await Task.Delay(10, context.Interrupted);
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
