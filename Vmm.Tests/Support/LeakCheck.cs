using System.Diagnostics;

namespace Vmm.Tests.Support;

/// <summary>Finds what a piece of work leaves behind: descriptors and threads of the product, without those of the .NET runtime.</summary>
internal static class LeakCheck
{
    /// <summary>Files that the .NET runtime may open at any time.</summary>
    private static readonly string[] s_runtimes = ["/proc/", "/memfd:doublemapper", "/dev/null", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/pts/"];

    /// <summary>Limit on the wait for an end, long enough for a busy machine.</summary>
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);

    /// <summary>Descriptors of sockets, pipes, eventfds, memfds and files outside the runtime's folders, of this process or another.</summary>
    internal static List<string> Descriptors(int? pid = null)
    {
        var list = new List<string>();
        foreach (string fd in Directory.GetFiles($"/proc/{pid?.ToString() ?? "self"}/fd"))
        {
            string? target = new FileInfo(fd).LinkTarget;
            if (target is null || target.EndsWith(".dll", StringComparison.Ordinal) || target.EndsWith(".so", StringComparison.Ordinal) || target.EndsWith(".pdb", StringComparison.Ordinal)) continue;
            if (s_runtimes.Any(r => target.StartsWith(r, StringComparison.Ordinal))) continue;
            list.Add(target);
        }
        return list;
    }

    /// <summary>
    /// Descriptors after a garbage collection. Without it, a later collection could close descriptors of earlier tests and hide a leak.
    /// </summary>
    internal static List<string> SettledDescriptors()
    {
        GC.Collect();
        GC.WaitForPendingFinalizers();
        return Descriptors();
    }

    /// <summary>Waits until no more descriptors are open than before, because a thread may close some a moment later.</summary>
    internal static void NoMoreThan(List<string> before, int? pid = null) => WaitFor(
        () => Descriptors(pid).Count <= before.Count, () => $"open before: {string.Join(", ", before.Order())}; now: {string.Join(", ", Descriptors(pid).Order())}");

    /// <summary>Names of the migration threads in this process or another.</summary>
    internal static List<string> Threads(int? pid = null) =>
        [.. ThreadNames(pid).Select(static t => t.Name).Where(static n => n.StartsWith("mig/", StringComparison.Ordinal) || n == "live_migration")];

    /// <summary>Ids and names of all threads of this process or another.</summary>
    internal static List<(int Id, string Name)> ThreadNames(int? pid = null) =>
        [.. Directory.GetDirectories($"/proc/{pid?.ToString() ?? "self"}/task").Select(static t =>
        {
            try
            {
                return (int.Parse(Path.GetFileName(t)), File.ReadAllText(Path.Combine(t, "comm")).Trim());
            }
            catch (IOException)
            {
                return (0, ""); // The thread ended after the listing.
            }
        })];

    /// <summary>Waits for a condition, with a deadline; threads, for example, end a moment after their tasks complete.</summary>
    internal static void WaitFor(Func<bool> condition, string what) => WaitFor(condition, () => what);

    private static void WaitFor(Func<bool> condition, Func<string> what)
    {
        var clock = Stopwatch.StartNew();
        while (!condition())
        {
            if (clock.Elapsed > s_deadline) Assert.Fail(what());
            Thread.Yield();
        }
    }
}
