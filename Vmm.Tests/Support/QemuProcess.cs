using System.Diagnostics;
using System.Text;
using System.Text.Json.Nodes;
using Vmm.Migration.Qmp;

namespace Vmm.Tests.Support;

/// <summary>The QEMU versions that the tests use. tools/test sets the variables that name their binaries.</summary>
internal static class QemuVersions
{
    internal const string Category = "interop";

    /// <summary>All versions that the tests use.</summary>
    internal static readonly string[] All = ["7.2", "10.0", "11.1"];

    /// <summary>The path of a version's binary. Without the binary it skips the test, or fails it where CI is set.</summary>
    internal static string Binary(string version)
    {
        string variable = $"VMM_QEMU_{version.Replace(".", "", StringComparison.Ordinal)}";
        string? path = Environment.GetEnvironmentVariable(variable);
        if (string.IsNullOrEmpty(path) && version == "7.2" && System.IO.File.Exists("/usr/bin/qemu-system-x86_64")) path = "/usr/bin/qemu-system-x86_64";
        if (!string.IsNullOrEmpty(path) && System.IO.File.Exists(path)) return path;
        Missing($"QEMU {version} is missing: {variable} is not set (run tools/test)");
        return string.Empty;
    }

    /// <summary>The folder that a variable names. Without the folder it skips the test, or fails it where CI is set.</summary>
    internal static string Folder(string variable)
    {
        string? path = Environment.GetEnvironmentVariable(variable);
        if (!string.IsNullOrEmpty(path) && Directory.Exists(path)) return path;
        Missing($"{variable} is not set (run tools/test)");
        return string.Empty;
    }

    /// <summary>The file that a variable names. Without the file it skips the test, or fails it where CI is set.</summary>
    internal static string File(string variable)
    {
        string? path = Environment.GetEnvironmentVariable(variable);
        if (!string.IsNullOrEmpty(path) && System.IO.File.Exists(path)) return path;
        Missing($"{variable} is not set (run tools/test)");
        return string.Empty;
    }

    /// <summary>Skips the test, or fails it where CI is set.</summary>
    internal static void Missing(string reason)
    {
        if (!string.IsNullOrEmpty(Environment.GetEnvironmentVariable("CI"))) Assert.Fail(reason);
        Assert.Ignore(reason);
    }
}

/// <summary>A running QEMU with a QMP connection and a private folder. Dispose kills it.</summary>
internal sealed class QemuProcess : IDisposable
{
    internal static readonly TimeSpan Deadline = TimeSpan.FromSeconds(60);

    private readonly Process _process;
    private readonly StringBuilder _stderr = new();
    private readonly TempDirectory _folder = new();

    /// <summary>Starts <c>-M none</c> with one RAM block.</summary>
    /// <param name="version">E.g. 11.1.</param>
    /// <param name="sizeBytes">Size of the block; 0 for no RAM.</param>
    /// <param name="block">Name of the block; <c>ram</c> is the default block of <c>-m</c>.</param>
    /// <param name="extra">More arguments, e.g. <c>-S</c>.</param>
    internal QemuProcess(string version, ulong sizeBytes, string block = "m", params string[] extra)
        : this(version, Machine(sizeBytes, block), extra)
    {
    }

    private QemuProcess(string version, string[] machine, string[] extra)
    {
        string socket = _folder["qmp"];
        var info = new ProcessStartInfo(QemuVersions.Binary(version)) { RedirectStandardError = true, RedirectStandardInput = true };
        // wait=on: QEMU accepts the client before its monitor thread exists. With wait=off two threads of 7.2 set the listener's
        // handler without a lock, so once in thousands of starts QEMU never greets the client (11.1 has the lock).
        string[] common = ["-nodefaults", "-display", "none", "-accel", "tcg", "-qmp", $"unix:{socket},server=on,wait=on"];
        foreach (string one in common.Concat(machine).Concat(extra)) info.ArgumentList.Add(one);
        _process = Process.Start(info)!;
        _process.ErrorDataReceived += (_, e) => { if (e.Data is not null) lock (_stderr) _stderr.AppendLine(e.Data); };
        _process.BeginErrorReadLine();
        Qmp = Connect(socket);
    }

    /// <summary>Starts <c>-M none</c> with the block <c>m</c> in a shared file.</summary>
    internal static QemuProcess WithRamFile(string version, ulong sizeBytes, string path, params string[] extra) => new(
        version,
        ["-M", "none,memory-backend=m", "-m", $"{sizeBytes >> 20}", "-object", $"memory-backend-file,id=m,size={sizeBytes},mem-path={path},share=on"],
        extra);

    /// <summary>Starts any machine.</summary>
    internal static QemuProcess WithMachine(string version, string[] machine, params string[] extra) => new(version, machine, extra);

    internal QmpClient Qmp { get; }

    internal int ProcessId => _process.Id;

    internal string Errors
    {
        get { lock (_stderr) return _stderr.ToString(); }
    }

    internal string Folder => _folder.Path;

    internal string File(string name) => _folder[name];

    internal JsonNode? Run(string command, JsonObject? arguments = null) => Qmp.Execute(command, arguments, Deadline);

    internal void SetCapability(string name, bool on) => Run("migrate-set-capabilities", new JsonObject
    {
        ["capabilities"] = new JsonArray(new JsonObject { ["capability"] = name, ["state"] = on }),
    });

    /// <summary>Makes QEMU listen on an address and returns the URI that reaches it.</summary>
    internal string Listen(string uri)
    {
        Run("migrate-incoming", new JsonObject { ["uri"] = uri });
        if (!uri.StartsWith("tcp:", StringComparison.Ordinal)) return uri;
        JsonNode address = Run("query-migrate")!["socket-address"]![0]!;
        return $"tcp:127.0.0.1:{address["port"]}";
    }

    /// <summary>Saves to a file through exec:. The command may still write after the migration has completed, so it renames the file at its end.</summary>
    internal void SaveByExec(string file)
    {
        System.IO.File.Delete(file);
        Run("migrate", new JsonObject { ["uri"] = $"exec:cat > {file}.part && mv {file}.part {file}" });
        Assert.That(WaitMigrated(), Is.EqualTo("completed"), () => Errors);
        LeakCheck.WaitFor(() => System.IO.File.Exists(file), $"the command did not write '{file}' in time");
    }

    /// <summary>Waits until query-migrate shows completed, failed or cancelled.</summary>
    internal string WaitMigrated()
    {
        var clock = Stopwatch.StartNew();
        while (clock.Elapsed < Deadline)
        {
            string status;
            try
            {
                status = Run("query-migrate")!["status"]?.ToString() ?? "none";
            }
            catch (Core.Errors.ChannelException)
            {
                return $"gone: {Errors}";
            }
            if (status is "completed" or "failed" or "cancelled") return status;
            Thread.Yield();
        }
        return "timeout";
    }

    /// <summary>Reads the first bytes of guest memory with pmemsave.</summary>
    internal byte[] DumpMemory(ulong sizeBytes)
    {
        string path = File("memory");
        Run("pmemsave", new JsonObject { ["val"] = 0, ["size"] = (long)sizeBytes, ["filename"] = path });
        byte[] bytes = System.IO.File.ReadAllBytes(path);
        System.IO.File.Delete(path);
        return bytes;
    }

    /// <summary>Sends a signal, e.g. STOP.</summary>
    internal void Signal(string name)
    {
        using var kill = Process.Start("kill", [$"-{name}", $"{_process.Id}"]);
        kill.WaitForExit();
    }

    /// <summary>Kills the process, as a crash does.</summary>
    internal void Kill()
    {
        _process.Kill();
        _process.WaitForExit();
    }

    public void Dispose()
    {
        Qmp.Dispose();
        if (!_process.HasExited) Kill();
        _process.Dispose();
        _folder.Dispose();
    }

    private static string[] Machine(ulong sizeBytes, string block) => (sizeBytes, block) switch
    {
        (0, _) => ["-M", "none"],
        (_, "ram") => ["-M", "none", "-m", $"{sizeBytes >> 20}"],
        _ => ["-M", $"none,memory-backend={block}", "-m", $"{sizeBytes >> 20}", "-object", $"memory-backend-ram,id={block},size={sizeBytes}"],
    };

    private QmpClient Connect(string socket)
    {
        var clock = Stopwatch.StartNew();
        while (true)
        {
            if (_process.HasExited) throw new InvalidOperationException($"QEMU ended: {Errors}");
            try
            {
                return QmpClient.Connect(socket, Deadline);
            }
            catch (Core.Errors.ChannelException) when (clock.Elapsed < Deadline)
            {
                // QEMU creates the socket a moment after its start, so try again.
                _process.WaitForExit(5);
            }
        }
    }
}
