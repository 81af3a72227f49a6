using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using System.Text.Json;
using Spectre.Console;
using Vmm.Core.Devices;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Tools.Devices;

namespace Vmm.Tools.Bench;

/// <summary>
/// Measures the transfer of a device's state from its server through two VMs to another server: four processes, connected by UNIX sockets. Compares it,
/// in turns, with a plain copy of as many bytes over one UNIX socket pair.
/// </summary>
internal static class VfioBench
{
    private static readonly JsonSerializerOptions s_json = new() { WriteIndented = true };

    private sealed record Round(double StateSeconds, double PlainSeconds, long[] GrowthKiB, double[] CpuSeconds);

    internal static int Run(int sizeMiB, int rounds, bool jsonOnly)
    {
        DirectoryInfo folder = Directory.CreateTempSubdirectory("vmm-bench-");
        var all = new List<Round>();
        try
        {
            for (int i = 0; i < rounds; i++)
            {
                double plain = PlainCopy(sizeMiB);
                (double state, long[] growth, double[] cpu) = State(sizeMiB, folder.FullName);
                all.Add(new Round(state, plain, growth, cpu));
                double thisRatio = plain / state;
                Console.Error.WriteLine(string.Create(CultureInfo.InvariantCulture,
                    $"round {i + 1}: state {sizeMiB / 1024.0 / state:F2} GiB/s, plain {sizeMiB / 1024.0 / plain:F2} GiB/s, ratio {thisRatio:F2}, growth {string.Join(' ', growth)} KiB, CPU {string.Join(' ', cpu.Select(F))} s"));
            }
        }
        finally
        {
            folder.Delete(recursive: true);
        }
        double ratio = Median(all.Select(static r => r.PlainSeconds)) / Median(all.Select(static r => r.StateSeconds));
        double pairedRatio = Median(all.Select(static r => r.PlainSeconds / r.StateSeconds));
        double bestRatio = all.Min(static r => r.PlainSeconds) / all.Min(static r => r.StateSeconds);
        long worst = all.Max(static r => r.GrowthKiB.Max());
        if (!jsonOnly)
        {
            Table table = new Table().AddColumns("", "GiB/s");
            table.AddRow("device state, server to server", F(sizeMiB / 1024.0 / Median(all.Select(static r => r.StateSeconds))));
            table.AddRow("plain copy, one socket pair", F(sizeMiB / 1024.0 / Median(all.Select(static r => r.PlainSeconds))));
            AnsiConsole.Write(table);
        }
        Console.WriteLine(JsonSerializer.Serialize(new { bench = "vfio", sizeMiB, rounds, ratio, pairedRatio, bestRatio, worstGrowthKiB = worst, runs = all }, s_json));
        return 0;
    }

    /// <summary>Serves the device until standard input ends; prints on request how much the process's memory has grown.</summary>
    internal static int Serve(string socket, string device)
    {
        using IVfioUserBackend backend = new DmaTestType().Create(DeviceOptions.Parse(device));
        using var server = new VfioUserServer(backend);
        Warmup.Run();
        server.Listen(socket);
        Console.WriteLine("serving");
        Console.ReadLine();
        // Touch the state just before the measurement, as the plain copy does with its buffers: some hosts take idle pages away.
        backend.RegionRead(0, DmaTestRegisters.StateChecksum, new byte[8]);
        Memory.StartPeak();
        long before = Memory.ResidentKiB;
        Console.WriteLine("measuring");
        Console.ReadLine();
        Console.WriteLine(Memory.PeakKiB - before);
        Console.ReadLine();
        return 0;
    }

    private static (double Seconds, long[] GrowthKiB, double[] CpuSeconds) State(int sizeMiB, string folder)
    {
        string a = Path.Combine(folder, "a"), b = Path.Combine(folder, "b"), to = Path.Combine(folder, "to");
        // Different seeds: with equal states the test could not tell that the state has arrived.
        using var serverA = new BenchProcess("serve", "--socket", a, "--device", $"dma-test,seed=1,precopy=off,state-size={sizeMiB}M");
        using var serverB = new BenchProcess("serve", "--socket", b, "--device", $"dma-test,seed=2,precopy=off,state-size={sizeMiB}M");
        serverA.Expect("serving");
        serverB.Expect("serving");
        using var destination = new NodeProcess(64, null, incoming: true, running: false, ["--address", $"unix:{to}", "--device", $"vfio-user-pci,socket={b},x-mig-chunk=1M"]);
        using var source = new NodeProcess(64, null, incoming: false, running: true, ["--device", $"vfio-user-pci,socket={a},x-mig-chunk=1M"]);
        destination.ReadLine();
        source.ReadLine();
        foreach (BenchProcess server in (BenchProcess[])[serverA, serverB])
        {
            server.WriteLine("go");
            server.Expect("measuring");
        }
        BenchProcess[] processes = [serverA, source, destination, serverB];
        double[] before = [.. processes.Select(static p => p.CpuSeconds)];
        source.WriteLine($"unix:{to}");
        NodeResult result = source.Result(), arrived = destination.Result();
        long[] growth = [Growth(serverA), result.GrowthKiB, arrived.GrowthKiB, Growth(serverB)];
        return (result.Downtime!.TotalMs / 1000, growth, [.. processes.Zip(before, static (p, b) => p.CpuSeconds - b)]);
    }

    private static long Growth(BenchProcess server)
    {
        server.WriteLine("growth");
        return long.Parse(server.ReadLine(), CultureInfo.InvariantCulture);
    }

    private static double PlainCopy(int sizeMiB)
    {
        string path = Path.Combine(Path.GetTempPath(), $"vmm-bench-plain-{Environment.ProcessId}");
        using var listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            listener.Bind(new UnixDomainSocketEndPoint(path));
            listener.Listen(1);
            using var from = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            from.Connect(new UnixDomainSocketEndPoint(path));
            using Socket to = listener.Accept();
            // The same work as for the state: copy bytes from memory to other memory, all of which was touched before.
            byte[][] data = Blocks(sizeMiB), sink = Blocks(sizeMiB);
            var sender = new Thread(() =>
            {
                foreach (byte[] block in data)
                    for (int at = 0; at < block.Length;) at += from.Send(block, at, block.Length - at, SocketFlags.None);
            });
            long start = Stopwatch.GetTimestamp();
            sender.Start();
            foreach (byte[] block in sink)
                for (int at = 0; at < block.Length;) at += to.Receive(block, at, block.Length - at, SocketFlags.None);
            double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
            sender.Join();
            return seconds;
        }
        finally
        {
            File.Delete(path);
        }
    }

    private static byte[][] Blocks(int sizeMiB)
    {
        byte[][] blocks = new byte[sizeMiB][];
        for (int i = 0; i < sizeMiB; i++)
        {
            blocks[i] = new byte[1 << 20];
            Random.Shared.NextBytes(blocks[i]);
        }
        return blocks;
    }

    private static string F(double v) => v.ToString("F2", CultureInfo.InvariantCulture);

    private static double Median(IEnumerable<double> values)
    {
        double[] sorted = [.. values.Order()];
        return sorted[sorted.Length / 2];
    }
}

/// <summary>Resident memory of this process, from /proc.</summary>
internal static class Memory
{
    internal static long ResidentKiB => Read("VmRSS:");

    internal static long PeakKiB => Read("VmHWM:");

    /// <summary>Resets the peak.</summary>
    internal static void StartPeak()
    {
        GC.Collect();
        File.WriteAllText("/proc/self/clear_refs", "5");
    }

    private static long Read(string field) => long.Parse(
        File.ReadLines("/proc/self/status").First(l => l.StartsWith(field, StringComparison.Ordinal))[field.Length..].Replace("kB", "", StringComparison.Ordinal), CultureInfo.InvariantCulture);
}
