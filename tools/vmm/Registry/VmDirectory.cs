using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using System.Text.Json;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Registry;

/// <summary>
/// The user's running VMs: a 0700 directory with one KEY.json per VM and, unless the VM was given another path, its socket KEY.qmp. KEY is the
/// name or the pid. Changes are made under the lock file, so two VMs cannot take one name and nobody removes what has just been made.
/// </summary>
internal sealed class VmDirectory
{
    private const string LockName = ".lock";
    private static readonly TimeSpan s_lockDeadline = TimeSpan.FromSeconds(5);

    /// <summary>Sockets of an update, named for the process that made them.</summary>
    private static readonly string[] s_perProcess = [".next", ".main", ".cpr", ".report", ".try.main", ".try.cpr", ".try.dev"];

    private VmDirectory(string path) => DirectoryPath = path;

    public string DirectoryPath { get; }

    /// <summary>Where the directory is for this user: <c>$XDG_RUNTIME_DIR/vmm</c>, else <c>vmm-UID</c> in the temp directory.</summary>
    public static string DefaultPath(Func<string, string?> getVariable)
    {
        string? runtime = getVariable("XDG_RUNTIME_DIR");
        if (!string.IsNullOrEmpty(runtime) && Path.IsPathRooted(runtime)) return Path.Combine(runtime, "vmm");
        string? temp = getVariable("TMPDIR");
        return Path.Combine(string.IsNullOrEmpty(temp) ? "/tmp" : temp, $"vmm-{PrivateDirectory.CurrentUserId}");
    }

    /// <summary>Opens the directory, making it when missing.</summary>
    /// <exception cref="ConfigurationException">It is not safe to use.</exception>
    public static VmDirectory Open(Func<string, string?> getVariable)
    {
        string path = DefaultPath(getVariable);
        PrivateDirectory.Ensure(path);
        return new VmDirectory(path);
    }

    /// <summary>Checks a name: it becomes a file name, and must not look like a pid.</summary>
    public static void CheckName(string name)
    {
        bool ok = name.Length is > 0 and <= 64 && name[0] != '.' && name.All(static c => char.IsAsciiLetterOrDigit(c) || c is '-' or '_' or '.')
            && !name.All(char.IsAsciiDigit);
        if (!ok)
            throw CliException.Usage($"--name '{name}': a name has 1 to 64 letters, digits, '-', '_' and '.', does not start with '.' and is not a number");
    }

    /// <summary>Takes a key for this process. Dispose the result to give it back; the socket itself belongs to the QMP server.</summary>
    /// <param name="name">The VM's name, or null.</param>
    /// <param name="qmpPath">An absolute path of the user's choice, or null for the default.</param>
    /// <param name="memoryBytes">RAM, for <c>vmm list</c>.</param>
    /// <param name="replaces">The process whose VM arrives here: nothing is entered until <see cref="VmRegistration.TakeOver"/>.</param>
    /// <param name="isAgain">This process has replaced itself: an entry of its own is no obstacle.</param>
    public VmRegistration Register(string? name, string? qmpPath, long memoryBytes, int? replaces = null, bool isAgain = false)
    {
        int pid = Environment.ProcessId;
        string key = name ?? pid.ToString(CultureInfo.InvariantCulture);
        var entry = new VmEntry
        {
            Pid = pid, StartTicks = VmEntry.ReadStartTicks(pid) ?? 0, Name = name, MemoryBytes = memoryBytes, QmpPath = qmpPath ?? Path.Combine(DirectoryPath, key + ".qmp"),
        };
        if (replaces is not null) return new VmRegistration(this, entry) { Replaces = replaces };
        using (Lock())
        {
            if (Scan().Find(e => e.Key == key) is { } other && !(isAgain && other.Pid == pid))
                throw new CliException(ExitCode.Refused, $"--name '{name}': a VM of that name runs already, pid {other.Pid}");
            Write(entry);
        }
        return new VmRegistration(this, entry);
    }

    /// <summary>Puts an entry in the place of the one that the process before had.</summary>
    internal void TakeOver(VmEntry entry)
    {
        using (Lock()) Write(entry);
    }

    /// <summary>
    /// The entry of a process, or null. Takes no lock and removes nothing: a caller that waits for a change asks again after each, and the process that
    /// it waits for needs the lock.
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
                // Its process gave it back since it was listed.
            }
        }
        return null;
    }

    private void Write(VmEntry entry)
    {
        string file = EntryPath(entry.Key), aside = file + ".new";
        File.WriteAllText(aside, JsonSerializer.Serialize(entry));
        File.Move(aside, file, overwrite: true);
    }

    /// <summary>All VMs that run, by key. Entries and sockets of dead processes are removed.</summary>
    public IReadOnlyList<VmEntry> List()
    {
        using (Lock()) return Scan();
    }

    /// <summary>Finds the VM that <c>--vm</c> means; without it, the only one there is.</summary>
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

    /// <summary>Removes the sockets of updates whose process was ended before it could: a program that starts <c>vmm</c> for its part has another pid.</summary>
    internal void RemoveLeftovers()
    {
        foreach (string file in Directory.EnumerateFiles(DirectoryPath))
        {
            string name = Path.GetFileName(file);
            string? suffix = Array.Find(s_perProcess, s => name.EndsWith(s, StringComparison.Ordinal));
            if (suffix is null || !int.TryParse(name[..^suffix.Length], NumberStyles.None, CultureInfo.InvariantCulture, out int pid)) continue;
            if (VmEntry.ReadStartTicks(pid) is null && !Answers(file)) File.Delete(file);
        }
    }

    internal void Unregister(VmEntry entry)
    {
        using (Lock())
        {
            // Another process may have taken the VM over, and the key with it.
            string file = EntryPath(entry.Key);
            if (File.Exists(file) && Read(file)?.Pid == entry.Pid) File.Delete(file);
        }
    }

    private static string Keys(IEnumerable<VmEntry> all) => string.Join(", ", all.Select(static e => e.Key));

    private string EntryPath(string key) => Path.Combine(DirectoryPath, key + ".json");

    private List<VmEntry> Scan()
    {
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
            // Nobody but us writes here, and files appear by rename: this is damage, which the caller removes.
            return null;
        }
    }

    // A VM in another pid namespace that shares this directory has no process here, but its socket answers.
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

    private void Remove(string file, VmEntry? entry)
    {
        // Only a socket in this directory is ours for certain; one at a path of the user's choice stays.
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
                return new FileStream(path, FileMode.OpenOrCreate, FileAccess.ReadWrite, FileShare.None);
            }
            catch (IOException) when (Stopwatch.GetElapsedTime(start) < s_lockDeadline)
            {
                // Held for a few file operations at a time; flock has no timed wait.
                Thread.Sleep(5);
            }
            catch (IOException e)
            {
                throw new CliException(ExitCode.Timeout, $"'{path}' is locked by another process: {e.Message}", e);
            }
        }
    }
}

/// <summary>A key of <see cref="VmDirectory"/> in the hands of this process.</summary>
internal sealed class VmRegistration(VmDirectory directory, VmEntry entry) : IDisposable
{
    private bool _disposed;

    public VmEntry Entry { get; private set; } = entry;

    /// <summary>The process that still has the key; null when this one has it.</summary>
    public int? Replaces { get; init; }

    /// <summary>Where this process listens until it has the VM.</summary>
    public string ListenPath => Replaces is null ? Entry.QmpPath : NextPath(Entry.Pid);

    /// <summary>Where a process listens that is to take this VM over: beside the VM's socket, whose place is taken by a rename.</summary>
    public string NextPath(int pid) => Path.Combine(Path.GetDirectoryName(Entry.QmpPath)!, $"{pid}.next");

    /// <summary>The VM runs here now.</summary>
    /// <param name="runningAtNs">Since when, CLOCK_MONOTONIC.</param>
    /// <param name="qmpPath">Where this process listens.</param>
    /// <param name="stoppedAtNs">When the VM stopped in the program that this one has replaced, CLOCK_MONOTONIC; 0 if it did not.</param>
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
