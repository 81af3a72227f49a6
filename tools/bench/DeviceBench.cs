using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using System.Text.Json;
using Microsoft.Extensions.DependencyInjection;
using Spectre.Console;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Devices.Vfio;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Tools.Devices;

namespace Vmm.Tools.Bench;

/// <summary>
/// Measures a served device from its VM: the time of a register read over the socket, compared with a ping-pong of the same bytes between two processes;
/// and the rate of DMA through mapped memory, compared with copies within the server's process. One run measures them in turns.
/// </summary>
internal static class DeviceBench
{
    private const ulong Bar = 0x8000_0000, MemoryBytes = 64 << 20;
    private const int RequestBytes = 32, ReplyBytes = 36, Warm = 20_000;
    private static readonly JsonSerializerOptions s_json = new() { WriteIndented = true };

    private sealed record Round(double ReadUs, double PingPongUs, double ToMemory, double FromMemory, double PlainTo, double PlainFrom);

    internal static int Run(int rounds, int reads, int pieceKiB, bool jsonOnly)
    {
        DirectoryInfo folder = Directory.CreateTempSubdirectory("vmm-bench-");
        try
        {
            string device = Path.Combine(folder.FullName, "device"), echo = Path.Combine(folder.FullName, "echo");
            using var server = new BenchProcess("serve-copy", "--socket", device);
            using var pong = new BenchProcess("echo", "--socket", echo);
            server.Expect("serving");
            pong.Expect("serving");
            var services = new ServiceCollection();
            services.AddVmm().AddPlugin<VfioPlugin>();
            using ServiceProvider provider = services.BuildServiceProvider();
            using Vm vm = provider.GetRequiredService<VmFactory>().Create(new VmOptions
            {
                Devices = [DeviceOptions.Parse($"vfio-user-pci,socket={device}")],
                Memory = [new RamBlockOptions { Name = "m", SizeBytes = MemoryBytes, Prealloc = true }],
            });
            vm.Cont();
            ushort bdf = (ushort)vm.Pci.Functions.Single().Address.DevFn;
            vm.Pci.ConfigWrite(bdf, PciRegisters.BaseAddress0, 4, (uint)Bar);
            vm.Pci.ConfigWrite(bdf, PciRegisters.Command, 2, 6);
            using var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            socket.Connect(new UnixDomainSocketEndPoint(echo));
            var ping = new Ping(socket);
            Read(vm, 0, CopyDevice.Identification);
            Median(Warm, () => Read(vm, 0, CopyDevice.Identification));
            Median(Warm, ping.Run);
            var all = new List<Round>();
            for (int i = 0; i < rounds; i++)
            {
                var round = new Round(Median(reads, () => Read(vm, 0, CopyDevice.Identification)), Median(reads, ping.Run),
                    Copy(vm, CopyDevice.Work.ToMemory, pieceKiB), Copy(vm, CopyDevice.Work.FromMemory, pieceKiB),
                    Copy(vm, CopyDevice.Work.PlainTo, pieceKiB), Copy(vm, CopyDevice.Work.PlainFrom, pieceKiB));
                all.Add(round);
                Console.Error.WriteLine(string.Create(CultureInfo.InvariantCulture,
                    $"round {i + 1}: read {round.ReadUs:F1} us, ping-pong {round.PingPongUs:F1} us; GiB/s: to memory {round.ToMemory:F1}, plain {round.PlainTo:F1}; from memory {round.FromMemory:F1}, plain {round.PlainFrom:F1}"));
            }
            Report(all, reads, pieceKiB, jsonOnly);
            return 0;
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    /// <summary>Serves the <see cref="CopyDevice"/> until standard input ends.</summary>
    internal static int Serve(string socket)
    {
        using IVfioUserBackend backend = new PciDeviceType<CopyPlugin>(new CopyDeviceFactory()).Create(DeviceOptions.Parse("copy"));
        using var server = new VfioUserServer(backend);
        server.Listen(socket);
        Console.WriteLine("serving");
        Console.ReadLine();
        return 0;
    }

    /// <summary>The other end of the ping-pong: receives the bytes of a request and sends the bytes of a reply.</summary>
    internal static int Echo(string path)
    {
        using var listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        listener.Bind(new UnixDomainSocketEndPoint(path));
        listener.Listen(1);
        Console.WriteLine("serving");
        using Socket client = listener.Accept();
        byte[] request = new byte[RequestBytes], reply = new byte[ReplyBytes];
        while (Ping.Fill(client, request)) client.Send(reply);
        return 0;
    }

    private static void Report(List<Round> all, int reads, int pieceKiB, bool jsonOnly)
    {
        double read = Median(all.Select(static r => r.ReadUs)), pingPong = Median(all.Select(static r => r.PingPongUs));
        double readRatio = Median(all.Select(static r => r.ReadUs / r.PingPongUs));
        double toRatio = Median(all.Select(static r => r.ToMemory / r.PlainTo)), fromRatio = Median(all.Select(static r => r.FromMemory / r.PlainFrom));
        if (!jsonOnly)
        {
            Table table = new Table().AddColumns("", "median", "against", "ratio");
            table.AddRow("register read, us", F(read), $"ping-pong {F(pingPong)}", F(readRatio));
            table.AddRow("DMA to memory, GiB/s", F(Median(all.Select(static r => r.ToMemory))), $"copy {F(Median(all.Select(static r => r.PlainTo)))}", F(toRatio));
            table.AddRow("DMA from memory, GiB/s", F(Median(all.Select(static r => r.FromMemory))), $"copy {F(Median(all.Select(static r => r.PlainFrom)))}", F(fromRatio));
            AnsiConsole.Write(table);
        }
        Console.WriteLine(JsonSerializer.Serialize(
            new { bench = "device", reads, pieceKiB, readUs = read, pingPongUs = pingPong, readRatio, dmaToRatio = toRatio, dmaFromRatio = fromRatio, runs = all }, s_json));
    }

    private static void Read(Vm vm, ulong register, ulong expected)
    {
        ulong found = vm.Pci.MmioRead(new GuestAddress(Bar + register), 4);
        if (found != expected) throw new InvalidOperationException($"register 0x{register:x} reads 0x{found:x}, expected 0x{expected:x}");
    }

    /// <summary>Copies all memory in pieces; returns GiB/s.</summary>
    private static double Copy(Vm vm, CopyDevice.Work work, int pieceKiB)
    {
        Write(vm, CopyDevice.MemoryAddress, 0);
        Write(vm, CopyDevice.Bytes, MemoryBytes);
        Write(vm, CopyDevice.Piece, (ulong)pieceKiB << 10);
        Write(vm, CopyDevice.Start, (ulong)work);
        ulong elapsedNs;
        // Poll slowly, because each poll is work for the server, which would distort the measurement.
        do Thread.Sleep(20);
        while ((elapsedNs = vm.Pci.MmioRead(new GuestAddress(Bar + CopyDevice.Elapsed), 8)) == 0);
        return elapsedNs == ulong.MaxValue ? throw new InvalidOperationException($"{work} failed") : MemoryBytes / (double)(1 << 30) / (elapsedNs / 1e9);
    }

    private static void Write(Vm vm, ulong register, ulong value) => vm.Pci.MmioWrite(new GuestAddress(Bar + register), 8, value);

    /// <summary>Returns the median time of an action in microseconds.</summary>
    private static double Median(int count, Action action)
    {
        long[] ticks = new long[count];
        for (int i = 0; i < count; i++)
        {
            long start = Stopwatch.GetTimestamp();
            action();
            ticks[i] = Stopwatch.GetTimestamp() - start;
        }
        return Median(ticks.Select(static t => t * 1e6 / Stopwatch.Frequency));
    }

    private static double Median(IEnumerable<double> values)
    {
        double[] sorted = [.. values.Order()];
        return sorted[sorted.Length / 2];
    }

    private static string F(double v) => v.ToString("F2", CultureInfo.InvariantCulture);

    private sealed class Ping(Socket socket)
    {
        private readonly byte[] _request = new byte[RequestBytes], _reply = new byte[ReplyBytes];

        internal void Run()
        {
            socket.Send(_request);
            if (!Fill(socket, _reply)) throw new InvalidOperationException("the other end is gone");
        }

        internal static bool Fill(Socket socket, byte[] bytes)
        {
            for (int have = 0; have < bytes.Length;)
            {
                int n = socket.Receive(bytes, have, bytes.Length - have, SocketFlags.None);
                if (n == 0) return false;
                have += n;
            }
            return true;
        }
    }
}
