using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using System.Text.Json;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Registry;

/// <summary>
/// The user's running VMs: a directory of mode 0700 with one KEY.json per VM and, unless the VM has another path, its socket KEY.qmp. KEY is the name
/// or the pid. Every change holds the lock file, so that two VMs cannot take one name and nobody removes a new file.
/// </summary>
internal sealed class VmDirectory
{
    private const string LockName = ".lock";
    private static readonly TimeSpan s_lockDeadline = TimeSpan.FromSeconds(5);

    /// <summary>Suffixes of the files of an update, whose names begin with the pid of the process that made them.</summary>
    private static readonly string[] s_perProcess = [".next", ".main", ".cpr", ".report", ".state", ".try.main", ".try.cpr", ".try.dev"];

    private VmDirectory(string path) => DirectoryPath = path;

    public string DirectoryPath { get; }

    /// <summary>The directory of this user: <c>$XDG_RUNTIME_DIR/vmm</c>, else <c>vmm-UID</c> in the temp directory.</summary>
    public static string DefaultPath(Func<string, string?> getVariable)
    {
        string? runtime = getVariable("XDG_RUNTIME_DIR");
        if (!string.IsNullOrEmpty(runtime) && Path.IsPathRooted(runtime)) return Path.Combine(runtime, "vmm");
        string? temp = getVariable("TMPDIR");
        return Path.Combine(string.IsNullOrEmpty(temp) ? "/tmp" : temp, $"vmm-{PrivateDirectory.CurrentUserId}");
    }

    /// <summary>Opens the directory; makes it if it is missing.</summary>
    /// <exception cref="ConfigurationException">Other users could change the directory.</exception>
    public static VmDirectory Open(Func<string, string?> getVariable)
    {
        string path = DefaultPath(getVariable);
        PrivateDirectory.Ensure(path);
        return new VmDirectory(path);
    }

    /// <summary>Checks a name, which becomes a file name and must not look like a pid.</summary>
    public static void CheckName(string name)
    {
        bool ok = name.Length is > 0 and <= 64 && name[0] != '.' && name.All(static c => char.IsAsciiLetterOrDigit(c) || c is '-' or '_' or '.')
            && !name.All(char.IsAsciiDigit);
        if (!ok)
            throw CliException.Usage($"--name '{name}': a name has 1 to 64 letters, digits, '-', '_' and '.', does not start with '.' and is not a number");
    }

    /// <summary>Registers this process's VM under a key. Disposing the result removes the entry, but not the socket, which belongs to the QMP server.</summary>
    /// <param name="name">The VM's name, or null.</param>
    /// <param name="qmpPath">Absolute path of the QMP socket, or null for the default.</param>
    /// <param name="memoryBytes">Size of the RAM, for <c>vmm list</c>.</param>
    /// <param name="replaces">Pid of the process whose VM arrives here, or null. It keeps the entry until <see cref="VmRegistration.TakeOver"/>.</param>
    /// <param name="isAgain">True if this process has replaced itself and may find its own entry.</param>
    public VmRegistration Register(string? name, string? qmpPath, long memoryBytes, int? replaces = null, bool isAgain = false)
    {
        int pid = Environment.ProcessId;
        string key = name ?? pid.ToString(CultureInfo.InvariantCulture);
        var entry = new VmEntry
        {
            Pid = pid, StartTicks = VmEntry.ReadStartTicks(pid) ?? 0, Name = name, MemoryBytes = memoryBytes, QmpPath = qmpPath ?? Path.Combine(DirectoryPath, key + ".qmp"),
        };
        // Refuse now what an update or a client would fail on later.
        if (replaces is null) _ = Posix.UnixAddress(entry.QmpPath);
        if (replaces is not null) return new VmRegistration(this, entry) { Replaces = replaces };
        using (Lock())
        {
            if (Scan().Find(e => e.Key == key) is { } other && !(isAgain && other.Pid == pid))
                throw new CliException(ExitCode.Refused, $"--name '{name}': a VM of that name runs already, pid {other.Pid}");
            Write(entry);
        }
        return new VmRegistration(this, entry);
    }

    /// <summary>Replaces the entry of the process that had the VM before.</summary>
    internal void TakeOver(VmEntry entry)
    {
        using (Lock()) Write(entry);
    }

    /// <summary>
    /// Returns the entry of a process, or null. Takes no lock and removes nothing, because callers call it after each change, while the process that they
    /// wait for needs the lock.
    /// </summary>
    public VmEntry? FindPid(int pid)
    {
        foreach (string file in Directory.EnumerateFiles(DirectoryPath, "*.json"))
        {
            try
            {
                if (Read(file) is { } entry && entry.Pid == pid && IsAlive(entry)) return entry;
            }
            catch (FileNotFoundException)
            {
                // The process has removed its entry since the directory was listed.
            }
        }
        return null;
    }

    private void Write(VmEntry entry)
    {
        string file = EntryPath(entry.Key), aside = file + ".new";
        using (var to = new FileStream(aside, OwnerOnly(FileMode.Create))) JsonSerializer.Serialize(to, entry);
        File.Move(aside, file, overwrite: true);
    }

    /// <summary>Returns the running VMs by key, and removes the entries and sockets of dead processes.</summary>
    public IReadOnlyList<VmEntry> List()
    {
        using (Lock()) return Scan();
    }

    /// <summary>Finds the VM that <c>--vm</c> names; without it, the only running VM.</summary>
    public VmEntry Resolve(string? vm)
    {
        IReadOnlyList<VmEntry> all = List();
        if (vm is null)
        {
            return all.Count switch
            {
                1 => all[0],
                0 => throw CliException.Unreachable("no VM runs", "start one with 'vmm run', or give --qmp PATH"),
                _ => throw CliException.Usage($"{all.Count} VMs run ({Keys(all)}); say which with --vm"),
            };
        }
        return all.FirstOrDefault(e => e.Key == vm)
            ?? all.FirstOrDefault(e => e.Pid.ToString(CultureInfo.InvariantCulture) == vm)
            ?? throw CliException.Unreachable($"--vm '{vm}': no such VM runs", all.Count > 0 ? $"running: {Keys(all)}" : null);
    }

    /// <summary>
    /// Removes the files of update processes that were killed. It looks at all pids, because the killed process may have been a program that started
    /// <c>vmm</c> as its child.
    /// </summary>
    internal void RemoveLeftovers()
    {
        foreach (string file in Directory.EnumerateFiles(DirectoryPath))
        {
            string name = Path.GetFileName(file);
            // From the first dot on: ".try.cpr" ends like ".cpr".
            int dot = name.IndexOf('.', StringComparison.Ordinal);
            if (dot < 0 || !s_perProcess.Contains(name[dot..]) || !int.TryParse(name[..dot], NumberStyles.None, CultureInfo.InvariantCulture, out int pid)) continue;
            if (VmEntry.ReadStartTicks(pid) is null && !Answers(file)) File.Delete(file);
        }
    }

    internal void Unregister(VmEntry entry)
    {
        using (Lock())
        {
            // Another process may have taken over the VM and its key.
            string file = EntryPath(entry.Key);
            if (File.Exists(file) && Read(file)?.Pid == entry.Pid) File.Delete(file);
        }
    }

    private static string Keys(IEnumerable<VmEntry> all) => string.Join(", ", all.Select(static e => e.Key));

    private string EntryPath(string key) => Path.Combine(DirectoryPath, key + ".json");

    private List<VmEntry> Scan()
    {
        RemoveLeftovers();
        var found = new List<VmEntry>();
        foreach (string file in Directory.EnumerateFiles(DirectoryPath, "*.json"))
        {
            VmEntry? entry = Read(file);
            if (entry is not null && IsAlive(entry)) found.Add(entry);
            else Remove(file, entry);
        }
        found.Sort(static (a, b) => string.CompareOrdinal(a.Key, b.Key));
        return found;
    }

    private static VmEntry? Read(string file)
    {
        try
        {
            return JsonSerializer.Deserialize<VmEntry>(File.ReadAllText(file));
        }
        catch (JsonException)
        {
            // Only vmm writes here, and by rename, so a file that cannot be parsed is damaged. The caller removes it.
            return null;
        }
    }

    // A VM in another pid namespace that shares this directory has no process here, but its socket answers, so try that too.
    private static bool IsAlive(VmEntry entry) =>
        VmEntry.ReadStartTicks(entry.Pid) is { } ticks && ticks == entry.StartTicks || Answers(entry.QmpPath);

    private static bool Answers(string path)
    {
        try
        {
            using var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            socket.Connect(new UnixDomainSocketEndPoint(path));
            return true;
        }
        catch (Exception e) when (e is SocketException or ArgumentException)
        {
            return false;
        }
    }

    private static FileStreamOptions OwnerOnly(FileMode mode) => new()
    {
        Mode = mode, Access = FileAccess.ReadWrite, Share = FileShare.None, UnixCreateMode = UnixFileMode.UserRead | UnixFileMode.UserWrite,
    };

    private void Remove(string file, VmEntry? entry)
    {
        // Remove a socket only in this directory: a file at a path that the user chose may belong to somebody else.
        if (entry is not null && Path.GetDirectoryName(entry.QmpPath) == DirectoryPath) File.Delete(entry.QmpPath);
        File.Delete(file);
    }

    private FileStream Lock()
    {
        string path = Path.Combine(DirectoryPath, LockName);
        long start = Stopwatch.GetTimestamp();
        while (true)
        {
            try
            {
                return new FileStream(path, OwnerOnly(FileMode.OpenOrCreate));
            }
            catch (IOException) when (Stopwatch.GetElapsedTime(start) < s_lockDeadline)
            {
                // flock has no wait with a deadline, and holders keep the lock only for a few file operations, so retry.
                Thread.Sleep(5);
            }
            catch (IOException e)
            {
                throw new CliException(ExitCode.Timeout, $"'{path}' is locked by another process: {e.Message}", e);
            }
        }
    }
}

/// <summary>A key of <see cref="VmDirectory"/> that this process has, or will have after an update.</summary>
internal sealed class VmRegistration(VmDirectory directory, VmEntry entry) : IDisposable
{
    private bool _disposed;

    public VmEntry Entry { get; private set; } = entry;

    /// <summary>The pid of the process that still has the key; null if this process has it.</summary>
    public int? Replaces { get; init; }

    /// <summary>Path of the QMP socket on which this process listens until it has the VM.</summary>
    public string ListenPath => Replaces is null ? Entry.QmpPath : NextPath(Entry.Pid);

    /// <summary>Path on which a process that will take this VM over listens: beside the VM's socket, so that a rename can replace that.</summary>
    public string NextPath(int pid) => Path.Combine(Path.GetDirectoryName(Entry.QmpPath)!, $"{pid}.next");

    /// <summary>Takes the key over, once the VM runs here.</summary>
    /// <param name="runningAtNs">When the VM started here, CLOCK_MONOTONIC.</param>
    /// <param name="qmpPath">Path on which this process listens.</param>
    /// <param name="stoppedAtNs">When the VM stopped in the program that this one has replaced, CLOCK_MONOTONIC; 0 if it did not stop.</param>
    public void TakeOver(long runningAtNs, string qmpPath, long stoppedAtNs)
    {
        Entry = Entry with { QmpPath = qmpPath, RunningAtNs = runningAtNs, PauseMs = stoppedAtNs == 0 ? 0 : (runningAtNs - stoppedAtNs) / 1e6 };
        directory.TakeOver(Entry);
    }

    public void Dispose()
    {
        if (_disposed) return;
        _disposed = true;
        directory.Unregister(Entry);
    }
}
