using System.Diagnostics;
using System.Globalization;
using System.Text.Json;
using System.Text.Json.Nodes;
using Spectre.Console;

namespace Vmm.Tools.Bench;

/// <summary>
/// Measures how long an update of the VMM stops its guest, with the <c>vmm</c> program beside this one. The VMs have small or large RAM, which is fully
/// written, and either no device or a busy one that another process serves. Each kind of VM is updated several times in a row.
/// </summary>
internal static class CprBench
{
    private static readonly JsonSerializerOptions s_json = new() { WriteIndented = true };
    private static readonly TimeSpan s_patience = TimeSpan.FromMinutes(10);

    private sealed record Kind(int RamMiB, bool HasDevice, double MedianMs, double Ms90, double LargestMs, double TotalMs, long Bytes, double[] PausesMs);

    internal static int Run(int updates, int smallMiB, int largeMiB, string accel, bool jsonOnly)
    {
        if (accel == "auto") accel = File.Exists("/dev/kvm") ? "kvm" : "none";
        var all = new List<Kind>();
        foreach (bool device in (bool[])[false, true])
        {
            foreach (int ram in (int[])[smallMiB, largeMiB])
            {
                Kind one = Measure(updates, ram, device, accel == "kvm");
                all.Add(one);
                Console.Error.WriteLine(string.Create(CultureInfo.InvariantCulture,
                    $"{ram} MiB, {(device ? "a device" : "no device")}: median {one.MedianMs:F1} ms, 90% {one.Ms90:F1}, largest {one.LargestMs:F1}, {one.Bytes} bytes"));
            }
        }
        if (!jsonOnly)
        {
            Table table = new Table().AddColumns("RAM, MiB", "devices", "median, ms", "90%, ms", "largest, ms", "whole command, ms", "bytes sent");
            foreach (Kind k in all) table.AddRow($"{k.RamMiB}", k.HasDevice ? "1" : "0", F(k.MedianMs), F(k.Ms90), F(k.LargestMs), F(k.TotalMs), $"{k.Bytes}");
            AnsiConsole.Write(table);
        }
        // Ratio of the pauses with large and small RAM; 1 means that the pause does not depend on RAM.
        double growth = all[1].MedianMs / all[0].MedianMs, growthWithDevice = all[3].MedianMs / all[2].MedianMs;
        Console.WriteLine(JsonSerializer.Serialize(new { bench = "cpr", accel, updates, growth, growthWithDevice, runs = all }, s_json));
        return 0;
    }

    private static Kind Measure(int updates, int ramMiB, bool device, bool kvm)
    {
        DirectoryInfo folder = Directory.CreateTempSubdirectory("vmm-bench-");
        string socket = Path.Combine(folder.FullName, "edu.sock");
        try
        {
            using Process? server = device ? Start(folder, "device", "serve", "--type", "edu", "--socket", socket) : null;
            using Process vm = Start(folder, ["run", "--name", "bench", .. Guest(ramMiB, kvm), .. device ? Device(socket, kvm) : []]);
            try
            {
                WaitFilled(vm, ramMiB);
                var pauses = new List<double>();
                double total = 0;
                long bytes = 0;
                for (int i = 0; i < updates; i++)
                {
                    JsonNode update = JsonNode.Parse(Output(folder, "update", "--vm", "bench", "--json"))!;
                    pauses.Add(update["pause-ms"]!.GetValue<double>());
                    total += update["total-ms"]!.GetValue<double>() / updates;
                    bytes = Math.Max(bytes, update["bytes"]!.GetValue<long>());
                }
                double[] sorted = [.. pauses.Order()];
                return new Kind(ramMiB, device, sorted[sorted.Length / 2], sorted[sorted.Length * 9 / 10], sorted[^1], total, bytes, [.. pauses]);
            }
            finally
            {
                Output(folder, "quit", "--vm", "bench");
                vm.WaitForExit();
                server?.Kill();
            }
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    /// <summary>RAM over 3 GiB needs a second block, because the MMIO hole of the devices is in between.</summary>
    private static string[] Guest(int ramMiB, bool kvm) => kvm
        ? ["--memory", $"{Math.Min(ramMiB, 3072)}M", .. ramMiB > 3072 ? (string[])["--memory", $"{ramMiB - 3072}M"] : [], "--accel", "kvm", "--kernel", "builtin:busy"]
        : ["--memory", "1M,id=edu", "--memory", $"{ramMiB}M,id=ram", "--workload", "pattern,block=ram,rate=64M,prefill=on,state=on"];

    private static string[] Device(string socket, bool kvm) => ["--device", $"vfio-user-pci,id=dev0,socket={socket}", .. kvm ? (string[])[] : ["--device", "edu-guest"]];

    private static void WaitFilled(Process vm, int ramMiB)
    {
        long start = Stopwatch.GetTimestamp();
        while (!vm.HasExited && Stopwatch.GetElapsedTime(start) < s_patience)
        {
            string? line = File.ReadLines($"/proc/{vm.Id}/status").FirstOrDefault(static l => l.StartsWith("RssShmem:", StringComparison.Ordinal));
            if (line is not null && long.Parse(line.Split(' ', StringSplitOptions.RemoveEmptyEntries)[1], CultureInfo.InvariantCulture) >= ramMiB * 1024L * 99 / 100) return;
            vm.WaitForExit(100);
        }
        throw new InvalidOperationException("the guest did not write its RAM");
    }

    private static Process Start(DirectoryInfo folder, params string[] arguments)
    {
        // Read the child's stderr, so that its output does not mix with the results and an exception can show it.
        var info = new ProcessStartInfo(Path.Combine(AppContext.BaseDirectory, "vmm"), arguments) { RedirectStandardInput = true, RedirectStandardError = true };
        info.Environment["XDG_RUNTIME_DIR"] = folder.FullName;
        Process process = Process.Start(info)!;
        var ready = new TaskCompletionSource();
        var text = new List<string>();
        process.ErrorDataReceived += (_, e) =>
        {
            if (e.Data is null) { ready.TrySetException(new InvalidOperationException($"vmm {arguments[0]}: {string.Join("; ", text)}")); return; }
            text.Add(e.Data);
            if (e.Data.Contains("ready:", StringComparison.Ordinal) || e.Data.Contains("serving", StringComparison.Ordinal)) ready.TrySetResult();
        };
        process.BeginErrorReadLine();
        ready.Task.Wait(s_patience);
        return process;
    }

    private static string Output(DirectoryInfo folder, params string[] arguments)
    {
        var info = new ProcessStartInfo(Path.Combine(AppContext.BaseDirectory, "vmm"), arguments) { RedirectStandardOutput = true };
        info.Environment["XDG_RUNTIME_DIR"] = folder.FullName;
        using Process process = Process.Start(info)!;
        string output = process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        return process.ExitCode == 0 ? output : throw new InvalidOperationException($"vmm {string.Join(' ', arguments)} ended with {process.ExitCode}");
    }

    private static string F(double value) => value.ToString("F1", CultureInfo.InvariantCulture);
}
