using System.Diagnostics;
using System.Globalization;
using System.Text.Json.Nodes;
using Vmm.Core.Errors;
using Vmm.Migration.Qmp;

namespace Vmm.Tools.Bench.Migrate;

/// <summary>One end of a migration: a process of vmm or QEMU, with its QMP session. Its RAM is a preallocated shared file.</summary>
internal sealed class End : IDisposable
{
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(120);
    private readonly Process _process;
    private readonly List<string> _errors = [];
    private readonly Peer _peer;

    private End(Peer peer, ProcessStartInfo info, string socket, bool waits)
    {
        _peer = peer;
        info.RedirectStandardError = info.RedirectStandardInput = true;
        _process = Process.Start(info)!;
        // vmm's socket exists before the VM is ready, and its line says that it is.
        using var ready = new ManualResetEventSlim(!peer.IsVmm);
        _process.ErrorDataReceived += (_, e) =>
        {
            if (e.Data is null) return;
            lock (_errors) _errors.Add(e.Data);
            if (e.Data.Contains("vmm: ready", StringComparison.Ordinal)) Set(ready);
        };
        _process.BeginErrorReadLine();
        try
        {
            for (long start = Stopwatch.GetTimestamp(); !ready.Wait(10);)
                if (_process.HasExited || Stopwatch.GetElapsedTime(start) > s_patience) throw new InvalidOperationException($"{peer.Name} did not start: {Errors}");
            Qmp = Connect(socket);
            if (waits) WaitUntilQuiet();
        }
        catch
        {
            Kill();
            throw;
        }
    }

    internal QmpClient Qmp { get; }

    /// <summary>CPU time of all threads so far, in steps of 10 ms. /proc's finer figures lack the threads that have ended, and the channels' threads have.</summary>
    internal double CpuSeconds => _process.HasExited ? throw new InvalidOperationException($"{_peer.Name} ended: {Errors}") : Cpu.Seconds(_process.Id);

    internal string Errors
    {
        get { lock (_errors) return string.Join("; ", _errors); }
    }

    /// <summary>Starts one end.</summary>
    /// <param name="peer">The program.</param>
    /// <param name="scenario">What the VM has and does.</param>
    /// <param name="ram">Its RAM.</param>
    /// <param name="folder">Folder for its sockets.</param>
    /// <param name="isIncoming">True for the destination.</param>
    internal static End Start(Peer peer, Scenario scenario, RamFile ram, string folder, bool isIncoming)
    {
        string socket = Path.Combine(folder, isIncoming ? "to" : "from");
        var info = new ProcessStartInfo(peer.Path, peer.IsVmm ? Vmm(scenario, ram, socket, isIncoming) : Qemu(scenario, ram, socket, folder, isIncoming));
        info.Environment["XDG_RUNTIME_DIR"] = info.Environment["TMPDIR"] = folder;
        return new End(peer, info, socket, waits: scenario.WriterMBps == 0 || isIncoming);
    }

    /// <summary>Sets the capabilities and parameters of the scenario and of the command line.</summary>
    /// <exception cref="QmpErrorException">The program refuses one of them.</exception>
    internal void Configure(Scenario scenario)
    {
        string[] capabilities = ["return-path", "events", .. scenario.Channels > 0 ? (string[])["multifd"] : [], .. _peer.Capabilities];
        Qmp.Execute("migrate-set-capabilities", new JsonObject
        {
            ["capabilities"] = new JsonArray([.. capabilities.Select(static c => (JsonNode)new JsonObject { ["capability"] = c.TrimEnd('!'), ["state"] = !c.EndsWith('!') })]),
        });
        var parameters = new JsonObject { ["max-bandwidth"] = scenario.MaxBandwidthMBps * 1_000_000L, ["downtime-limit"] = scenario.DowntimeLimitMs };
        if (scenario.Channels > 0) parameters["multifd-channels"] = scenario.Channels;
        if (scenario.Compression != "none")
        {
            parameters["multifd-compression"] = scenario.Compression;
            parameters[$"multifd-{scenario.Compression}-level"] = 1;
        }
        foreach ((string name, string value) in _peer.Parameters) parameters[name] = Value(value);
        Qmp.Execute("migrate-set-parameters", parameters);
    }

    /// <summary>Makes the destination listen and returns its address.</summary>
    internal string Listen()
    {
        // vmm listens from the start, as `vmm run --incoming` does; QEMU takes multifd only before it listens.
        if (!_peer.IsVmm) Qmp.Execute("migrate-incoming", new JsonObject { ["uri"] = "tcp:127.0.0.1:0" });
        return $"tcp:127.0.0.1:{Qmp.Execute("query-migrate")!["socket-address"]![0]!["port"]}";
    }

    /// <summary>Measures the bytes of pages that the guest dirties, in 10^6 a second; a page that is written twice within the second counts once.</summary>
    internal double DirtyMBps()
    {
        // By sampling, because QEMU's dirty bitmap counts nothing under TCG.
        Qmp.Execute("calc-dirty-rate", new JsonObject { ["calc-time"] = 1, ["mode"] = "page-sampling", ["sample-pages"] = 16384 });
        for (long start = Stopwatch.GetTimestamp(); Stopwatch.GetElapsedTime(start) < s_patience; _process.WaitForExit(50))
        {
            JsonNode answer = Qmp.Execute("query-dirty-rate")!;
            if (answer["status"]!.ToString() == "measured") return answer["dirty-rate"]!.GetValue<long>() * 1.048576;
        }
        throw new InvalidOperationException($"{_peer.Name} did not measure the dirty rate");
    }

    /// <summary>Waits until the guest writes, so that a start does not count.</summary>
    internal void WaitForWriter()
    {
        for (int i = 0; i < 30; i++)
            if (DirtyMBps() > 0) return;
        throw new InvalidOperationException($"{_peer.Name}: the guest does not write");
    }

    public void Dispose()
    {
        Qmp.Dispose();
        Kill();
    }

    private static string[] Vmm(Scenario scenario, RamFile ram, string socket, bool isIncoming) =>
    [
        "run", "--qmp", socket, "--accel", "none", "--memory", $"{ram.SizeBytes >> 20}M,id=m,file={ram.Path},share=on,prealloc=on",
        .. isIncoming ? (string[])["--incoming", "tcp:127.0.0.1:0"] : [],
        // Without a writer of its own the destination's RAM stays as it arrived, and can be compared.
        .. scenario.WriterMBps > 0 && !isIncoming ? (string[])["--workload", $"pattern,rate={scenario.WriterMBps * 1_000_000L}"] : [],
        .. Enumerable.Range(0, scenario.Devices).SelectMany(static i => (string[])["--device", $"scratch,id=s{i}"]),
    ];

    private static string[] Qemu(Scenario scenario, RamFile ram, string socket, string folder, bool isIncoming)
    {
        List<string> arguments =
        [
            "-nodefaults", "-display", "none", "-accel", "tcg", "-qmp", $"unix:{socket},server=on,wait=off", "-m", $"{ram.SizeBytes >> 20}",
            "-object", $"memory-backend-file,id=m,size={ram.SizeBytes >> 20}M,mem-path={ram.Path},share=on,prealloc=on",
        ];
        if (isIncoming) arguments.AddRange(["-incoming", "defer"]);
        if (scenario.WriterMBps == 0) return [.. arguments, "-M", "none,memory-backend=m"];
        string guest = Path.Combine(folder, "guest");
        File.WriteAllBytes(guest, WriterGuest.Build(ram.SizeBytes, scenario.WriterMBps));
        // The destination's guest does not go on, so that its RAM stays as it arrived.
        return [.. arguments, "-M", "pc,memory-backend=m", "-kernel", guest, .. isIncoming ? (string[])["-S"] : []];
    }

    private static JsonNode Value(string text) =>
        bool.TryParse(text, out bool flag) ? JsonValue.Create(flag)
        : long.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out long number) ? JsonValue.Create(number) : JsonValue.Create(text);

    private static void Set(ManualResetEventSlim ready)
    {
        try
        {
            ready.Set();
        }
        catch (ObjectDisposedException)
        {
            // A second such line: nobody waits any more.
        }
    }

    private QmpClient Connect(string socket)
    {
        for (long start = Stopwatch.GetTimestamp(); ; _process.WaitForExit(10))
        {
            try
            {
                return QmpClient.Connect(socket, s_patience);
            }
            catch (ChannelException e) when (_process.HasExited || Stopwatch.GetElapsedTime(start) > s_patience)
            {
                throw new InvalidOperationException($"{_peer.Name} did not start: {Errors}", e);
            }
            catch (ChannelException)
            {
                // QEMU does not report when it has made its socket.
            }
        }
    }

    /// <summary>Waits until the process has used almost no CPU time for a while: what it does at its start does not belong to the migration.</summary>
    private void WaitUntilQuiet()
    {
        double before = CpuSeconds;
        for (int i = 0; i < 100 && !_process.WaitForExit(150); i++)
        {
            double now = CpuSeconds;
            if (now - before < 0.015) return;
            before = now;
        }
    }

    private void Kill()
    {
        if (!_process.HasExited) _process.Kill();
        _process.WaitForExit();
        _process.Dispose();
    }
}
