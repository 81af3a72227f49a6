using System.ComponentModel;
using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using System.Text.Json.Nodes;

namespace Vmm.Tools.Bench.Migrate;

/// <summary>What the loopback can carry: iperf3 with a pair of processes for each stream, because old versions serve all streams of a process with one thread.</summary>
internal static class Loopback
{
    private const int Seconds = 2;

    /// <summary>Measures 10^9 bytes a second of some streams together, as their receivers count them; null without iperf3.</summary>
    internal static double? GBps(int streams)
    {
        var servers = new List<Process>();
        var clients = new List<Process>();
        try
        {
            for (int i = 0; i < streams; i++)
            {
                int port = FreePort();
                servers.Add(Start("-s", "-1", "-B", "127.0.0.1", "-p", $"{port}"));
                // Its first line says that it listens.
                while (servers[^1].StandardOutput.ReadLine() is { } line && !line.Contains("listening", StringComparison.Ordinal)) { }
                clients.Add(Start("-c", "127.0.0.1", "-p", $"{port}", "-t", $"{Seconds}", "-J"));
            }
            double bits = 0;
            foreach (Process client in clients)
            {
                JsonNode answer = JsonNode.Parse(client.StandardOutput.ReadToEnd())!;
                bits += (answer["end"]?["sum_received"]?["bits_per_second"] ?? throw new InvalidOperationException($"iperf3: {answer["error"]}")).GetValue<double>();
            }
            return bits / 8e9;
        }
        catch (Win32Exception)
        {
            return null;
        }
        finally
        {
            foreach (Process one in (Process[])[.. clients, .. servers])
            {
                if (!one.WaitForExit(1000)) one.Kill();
                one.Dispose();
            }
        }
    }

    private static Process Start(params string[] arguments) =>
        Process.Start(new ProcessStartInfo("iperf3", [.. arguments, "--forceflush"]) { RedirectStandardOutput = true, RedirectStandardError = true })!;

    private static int FreePort()
    {
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        return ((IPEndPoint)listener.LocalEndpoint).Port;
    }
}
