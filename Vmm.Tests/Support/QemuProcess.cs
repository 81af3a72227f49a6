using System.Diagnostics;
using System.Text;
using System.Text.Json.Nodes;
using Vmm.Migration.Qmp;

namespace Vmm.Tests.Support;

/// <summary>The QEMU versions that the tests can reach; the variables come from tools/test.</summary>
internal static class QemuVersions
{
    internal const string Category = "interop";

    /// <summary>Every version that the suite is written for.</summary>
    internal static readonly string[] All = ["7.2", "10.0", "11.1"];

    /// <summary>Path of a version's binary. Missing: ignored with the reason, or failed where CI is set.</summary>
    internal static string Binary(string version)
    {
        string variable = $"VMM_QEMU_{version.Replace(".", "", StringComparison.Ordinal)}";
        string? path = Environment.GetEnvironmentVariable(variable);
        if (string.IsNullOrEmpty(path) && version == "7.2" && System.IO.File.Exists("/usr/bin/qemu-system-x86_64")) path = "/usr/bin/qemu-system-x86_64";
        if (!string.IsNullOrEmpty(path) && System.IO.File.Exists(path)) return path;
        Missing($"QEMU {version} is missing: {variable} is not set (run tools/test)");
        return string.Empty;
    }

    /// <summary>A folder named by a variable, with the same rule.</summary>
    internal static string Folder(string variable)
    {
        string? path = Environment.GetEnvironmentVariable(variable);
        if (!string.IsNullOrEmpty(path) && Directory.Exists(path)) return path;
        Missing($"{variable} is not set (run tools/test)");
        return string.Empty;
    }

    /// <summary>A file named by a variable, with the same rule.</summary>
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

/// <summary>A running QEMU with a QMP connection and a private folder; killed on dispose.</summary>
internal sealed class QemuProcess : IDisposable
{
    internal static readonly TimeSpan Deadline = TimeSpan.FromSeconds(60);

    private readonly Process _process;
    private readonly StringBuilder _stderr = new();
    private readonly TempDirectory _folder = new();

    /// <summary>Starts <c>-M none</c> with one block.</summary>
    /// <param name="version">E.g. 11.1.</param>
    /// <param name="sizeBytes">Block size; 0 for none.</param>
    /// <param name="block">Block name; <c>ram</c> is the default one of <c>-m</c>.</param>
    /// <param name="extra">More arguments, e.g. <c>-S</c>.</param>
    internal QemuProcess(string version, ulong sizeBytes, string block = "m", params string[] extra)
        : this(version, Machine(sizeBytes, block), extra)
    {
    }

    private QemuProcess(string version, string[] machine, string[] extra)
    {
        string socket = _folder["qmp"];
        var info = new ProcessStartInfo(QemuVersions.Binary(version)) { RedirectStandardError = true, RedirectStandardInput = true };
        // wait=on: QEMU takes the client before its monitor thread exists. With wait=off two of 7.2's threads set the
        // listener's handler without a lock, and once in thousands of starts the client is never greeted (11.1 has the lock).
        string[] common = ["-nodefaults", "-display", "none", "-accel", "tcg", "-qmp", $"unix:{socket},server=on,wait=on"];
        foreach (string one in common.Concat(machine).Concat(extra)) info.ArgumentList.Add(one);
        _process = Process.Start(info)!;
        _process.ErrorDataReceived += (_, e) => { if (e.Data is not null) lock (_stderr) _stderr.AppendLine(e.Data); };
        _process.BeginErrorReadLine();
        Qmp = Connect(socket);
    }

    /// <summary>Starts <c>-M none</c> with block <c>m</c> on a shared file.</summary>
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

    /// <summary>Listens on an address and returns the URI to reach it.</summary>
    internal string Listen(string uri)
    {
        Run("migrate-incoming", new JsonObject { ["uri"] = uri });
        if (!uri.StartsWith("tcp:", StringComparison.Ordinal)) return uri;
        JsonNode address = Run("query-migrate")!["socket-address"]![0]!;
        return $"tcp:127.0.0.1:{address["port"]}";
    }

    /// <summary>Saves to a file by a command, which still writes when the migration has completed: the file has its name once it is whole.</summary>
    internal void SaveByExec(string file)
    {
        System.IO.File.Delete(file);
        Run("migrate", new JsonObject { ["uri"] = $"exec:cat > {file}.part && mv {file}.part {file}" });
        Assert.That(WaitMigrated(), Is.EqualTo("completed"), () => Errors);
        LeakCheck.WaitFor(() => System.IO.File.Exists(file), $"the command has written '{file}'");
    }

    /// <summary>Waits until query-migrate shows a terminal status.</summary>
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

    /// <summary>The first bytes of guest memory, as QEMU's monitor saves them.</summary>
    internal byte[] DumpMemory(ulong sizeBytes)
    {
        string path = File("memory");
        Run("pmemsave", new JsonObject { ["val"] = 0, ["size"] = (long)sizeBytes, ["filename"] = path });
        byte[] bytes = System.IO.File.ReadAllBytes(path);
        System.IO.File.Delete(path);
        return bytes;
    }

    /// <summary>Ends the process at once, as a crash would.</summary>
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
                // The socket appears a moment after the start; its appearance is the event.
                _process.WaitForExit(5);
            }
        }
    }
}
