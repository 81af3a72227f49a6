using System.Diagnostics;
using System.Globalization;
using System.Text.Json;
using System.Text.Json.Nodes;
using Spectre.Console;
using Vmm.Core.Errors;
using Vmm.Migration.Qmp;

namespace Vmm.Tools.Bench;

/// <summary>One measured migration.</summary>
internal sealed record Measurement(double Seconds, double SourceCpuSeconds, double DestinationCpuSeconds);

/// <summary>Measures RAM throughput and downtime, with each end in its own process.</summary>
internal static class RamBench
{
    private static readonly JsonSerializerOptions s_json = new() { WriteIndented = true };

    internal static int Run(int sizeMiB, int rounds, string? qemu, bool jsonOnly)
    {
        string file = Path.Combine("/dev/shm", $"vmm-bench-{Environment.ProcessId}");
        try
        {
            Fill(file, sizeMiB);
            var ours = new List<Measurement>();
            var theirs = new List<Measurement>();
            for (int i = 0; i < rounds; i++)
            {
                ours.Add(Ours(sizeMiB, file));
                if (qemu is not null) theirs.Add(Qemu(qemu, sizeMiB, file));
                Console.Error.WriteLine($"round {i + 1}: vmm {ours[^1].Seconds:F3} s{(qemu is null ? "" : $", QEMU {theirs[^1].Seconds:F3} s")}");
            }
            Report(sizeMiB, ours, theirs, jsonOnly);
            if (qemu is null) Console.Error.WriteLine("bench: no QEMU to compare with (set VMM_QEMU_111 or --qemu)");
            return 0;
        }
        finally
        {
            File.Delete(file);
        }
    }

    internal static int Downtime(int sizeMiB, int rounds, bool jsonOnly)
    {
        var total = new List<double>();
        for (int i = 0; i < rounds; i++)
        {
            using var destination = new NodeProcess(sizeMiB, null, incoming: true, running: false);
            using var source = new NodeProcess(sizeMiB, null, incoming: false, running: true);
            string address = destination.ReadLine();
            source.ReadLine();
            source.WriteLine(address);
            NodeResult result = source.Result();
            destination.Result();
            total.Add(result.Downtime!.TotalMs);
            if (!jsonOnly) Console.Error.WriteLine($"round {i + 1}: {JsonSerializer.Serialize(result.Downtime)}");
        }
        Console.WriteLine(JsonSerializer.Serialize(new { sizeMiB, rounds, medianMs = Median(total), maxMs = total.Max() }, s_json));
        return 0;
    }

    private static Measurement Ours(int sizeMiB, string file)
    {
        using var destination = new NodeProcess(sizeMiB, null, incoming: true, running: false);
        using var source = new NodeProcess(sizeMiB, file, incoming: false, running: false);
        string address = destination.ReadLine();
        source.ReadLine();
        (double s0, double d0) = (source.CpuSeconds, destination.CpuSeconds);
        long start = Stopwatch.GetTimestamp();
        source.WriteLine(address);
        source.Result();
        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
        destination.Result();
        return new Measurement(seconds, source.CpuSeconds - s0, destination.CpuSeconds - d0);
    }

    private static Measurement Qemu(string qemu, int sizeMiB, string file)
    {
        using var destination = new QemuNode(qemu, sizeMiB, $"memory-backend-ram,id=m,size={sizeMiB}M,prealloc=on", "-incoming", "tcp:127.0.0.1:0");
        using var source = new QemuNode(qemu, sizeMiB, $"memory-backend-file,id=m,size={sizeMiB}M,mem-path={file},share=on,prealloc=on");
        string port = destination.Qmp.Execute("query-migrate")!["socket-address"]![0]!["port"]!.ToString();
        foreach (QemuNode node in (QemuNode[])[source, destination])
            node.Qmp.Execute("migrate-set-capabilities", new JsonObject { ["capabilities"] = new JsonArray(new JsonObject { ["capability"] = "return-path", ["state"] = true }) });
        source.Qmp.Execute("migrate-set-capabilities", new JsonObject { ["capabilities"] = new JsonArray(new JsonObject { ["capability"] = "events", ["state"] = true }) });
        source.Qmp.Execute("migrate-set-parameters", new JsonObject { ["max-bandwidth"] = 0 });
        (double s0, double d0) = (source.CpuSeconds, destination.CpuSeconds);
        long start = Stopwatch.GetTimestamp();
        Task<QmpEvent> done = source.Qmp.WaitForEventAsync("MIGRATION", static e => e.Data["status"]?.ToString() is "completed" or "failed");
        source.Qmp.Execute("migrate", new JsonObject { ["uri"] = $"tcp:127.0.0.1:{port}" });
        string status = done.WaitAsync(TimeSpan.FromSeconds(120)).Result.Data["status"]!.ToString();
        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
        if (status != "completed") throw new InvalidOperationException($"QEMU's migration ended as {status}");
        return new Measurement(seconds, source.CpuSeconds - s0, destination.CpuSeconds - d0);
    }

    private static void Report(int sizeMiB, List<Measurement> ours, List<Measurement> theirs, bool jsonOnly)
    {
        double gib = sizeMiB / 1024.0;
        object Side(List<Measurement> m) => new
        {
            medianSeconds = Median(m.Select(static x => x.Seconds)),
            gibPerSecond = gib / Median(m.Select(static x => x.Seconds)),
            cpuSecondsPerGib = Median(m.Select(static x => x.SourceCpuSeconds + x.DestinationCpuSeconds)) / gib,
            sourceCpuSecondsPerGib = Median(m.Select(static x => x.SourceCpuSeconds)) / gib,
            destinationCpuSecondsPerGib = Median(m.Select(static x => x.DestinationCpuSeconds)) / gib,
            runs = m,
        };
        double? throughput = theirs.Count == 0 ? null : Median(theirs.Select(static x => x.Seconds)) / Median(ours.Select(static x => x.Seconds));
        double? cpu = theirs.Count == 0 ? null : Median(ours.Select(static x => x.SourceCpuSeconds + x.DestinationCpuSeconds)) / Median(theirs.Select(static x => x.SourceCpuSeconds + x.DestinationCpuSeconds));
        if (!jsonOnly)
        {
            Table table = new Table().AddColumns("", "GiB/s", "CPU s/GiB", "source", "destination");
            Row(table, "vmm", ours, gib);
            if (theirs.Count > 0) Row(table, "QEMU", theirs, gib);
            AnsiConsole.Write(table);
        }
        Console.WriteLine(JsonSerializer.Serialize(
            new { bench = "ram", sizeMiB, rounds = ours.Count, throughputRatio = throughput, cpuRatio = cpu, vmm = Side(ours), qemu = theirs.Count == 0 ? null : Side(theirs) }, s_json));
    }

    private static void Row(Table table, string name, List<Measurement> m, double gib)
    {
        string F(double v) => v.ToString("F3", CultureInfo.InvariantCulture);
        double s = Median(m.Select(static x => x.SourceCpuSeconds)) / gib, d = Median(m.Select(static x => x.DestinationCpuSeconds)) / gib;
        table.AddRow(name, F(gib / Median(m.Select(static x => x.Seconds))), F(s + d), F(s), F(d));
    }

    private static double Median(IEnumerable<double> values)
    {
        double[] sorted = [.. values.Order()];
        return sorted.Length % 2 == 1 ? sorted[sorted.Length / 2] : (sorted[(sorted.Length / 2) - 1] + sorted[sorted.Length / 2]) / 2;
    }

    private static void Fill(string path, int sizeMiB)
    {
        byte[] buffer = new byte[1 << 20];
        var random = new Random(1);
        using FileStream stream = File.Create(path);
        for (int i = 0; i < sizeMiB; i++)
        {
            random.NextBytes(buffer);
            stream.Write(buffer);
        }
    }
}

/// <summary>CPU time of another process, from /proc, which measures vmm and QEMU with the same clock.</summary>
internal static class Cpu
{
    internal static double Seconds(int pid)
    {
        string stat = File.ReadAllText($"/proc/{pid}/stat");
        string[] fields = stat[(stat.LastIndexOf(')') + 2)..].Split(' ');
        return (long.Parse(fields[11], CultureInfo.InvariantCulture) + long.Parse(fields[12], CultureInfo.InvariantCulture)) / 100.0;
    }
}

/// <summary>A child process that runs a hidden command of this program and communicates by lines.</summary>
internal class BenchProcess : IDisposable
{
    private readonly Process _process;

    internal BenchProcess(params string[] arguments)
    {
        string self = Environment.ProcessPath!;
        var info = new ProcessStartInfo(self) { RedirectStandardInput = true, RedirectStandardOutput = true };
        if (Path.GetFileNameWithoutExtension(self) == "dotnet") info.ArgumentList.Add(Path.Combine(AppContext.BaseDirectory, "bench.dll"));
        foreach (string one in arguments) info.ArgumentList.Add(one);
        _process = Process.Start(info)!;
    }

    internal double CpuSeconds => Cpu.Seconds(_process.Id);

    internal string ReadLine() => _process.StandardOutput.ReadLine() ?? throw new InvalidOperationException("a child ended early");

    internal void Expect(string line)
    {
        string found = ReadLine();
        if (found != line) throw new InvalidOperationException($"a child sent '{found}', expected '{line}'");
    }

    internal void WriteLine(string line) => _process.StandardInput.WriteLine(line);

    public void Dispose()
    {
        _process.StandardInput.Close();
        if (!_process.WaitForExit(5000)) _process.Kill();
        _process.Dispose();
        GC.SuppressFinalize(this);
    }
}

/// <summary>A child that runs <see cref="Node"/>.</summary>
internal sealed class NodeProcess(int sizeMiB, string? file, bool incoming, bool running, string[]? more = null)
    : BenchProcess(Arguments(sizeMiB, file, incoming, running, more ?? []))
{
    internal NodeResult Result()
    {
        NodeResult result = JsonSerializer.Deserialize<NodeResult>(ReadLine())!;
        return result.Status == "completed" ? result : throw new InvalidOperationException($"migration ended as {result.Status}: {result.Error}");
    }

    private static string[] Arguments(int sizeMiB, string? file, bool incoming, bool running, string[] more)
    {
        List<string> arguments = ["node", "--size", $"{sizeMiB}"];
        if (file is not null) arguments.AddRange(["--ram-file", file]);
        if (incoming) arguments.Add("--incoming");
        if (running) arguments.Add("--running");
        arguments.AddRange(more);
        return [.. arguments];
    }
}

/// <summary>A QEMU with one preallocated RAM block.</summary>
internal sealed class QemuNode : IDisposable
{
    private readonly Process _process;
    private readonly DirectoryInfo _folder = Directory.CreateTempSubdirectory("vmm-bench-");

    internal QemuNode(string qemu, int sizeMiB, string backend, params string[] extra)
    {
        string socket = Path.Combine(_folder.FullName, "qmp");
        var info = new ProcessStartInfo(qemu);
        string[] arguments = ["-nodefaults", "-display", "none", "-accel", "tcg", "-S", "-qmp", $"unix:{socket},server=on,wait=off",
            "-M", "none,memory-backend=m", "-m", $"{sizeMiB}", "-object", backend];
        foreach (string one in arguments.Concat(extra)) info.ArgumentList.Add(one);
        _process = Process.Start(info)!;
        for (long deadline = Environment.TickCount64 + 60_000; ;)
        {
            try
            {
                Qmp = QmpClient.Connect(socket, TimeSpan.FromSeconds(60));
                break;
            }
            catch (ChannelException) when (Environment.TickCount64 < deadline && !_process.HasExited)
            {
                _process.WaitForExit(10);
            }
        }
    }

    internal QmpClient Qmp { get; }

    internal double CpuSeconds => Cpu.Seconds(_process.Id);

    public void Dispose()
    {
        Qmp.Dispose();
        _process.Kill();
        _process.WaitForExit();
        _process.Dispose();
        _folder.Delete(recursive: true);
    }
}
