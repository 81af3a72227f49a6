using System.Diagnostics;

namespace Vmm.Tests.Support;

/// <summary>Counts what a piece of work leaves behind: descriptors that are not the runtime's own, migration threads, files of a folder.</summary>
internal static class LeakCheck
{
    /// <summary>What the runtime opens when it pleases.</summary>
    private static readonly string[] s_runtimes = ["/proc/", "/memfd:doublemapper", "/dev/null", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/pts/"];

    /// <summary>How long what ends on its own may take to, also on a machine that does other work.</summary>
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

    /// <summary>What is open once nothing is left that earlier tests forgot: the garbage collector would close it in the middle of the count.</summary>
    internal static List<string> SettledDescriptors()
    {
        GC.Collect();
        GC.WaitForPendingFinalizers();
        return Descriptors();
    }

    /// <summary>Waits until no more descriptors are open than before: what closes them may be a thread that ends a moment later.</summary>
    internal static void NoMoreThan(List<string> before, int? pid = null) => WaitFor(
        () => Descriptors(pid).Count <= before.Count, () => $"open before: {string.Join(", ", before.Order())}; now: {string.Join(", ", Descriptors(pid).Order())}");

    /// <summary>Names of threads that the product starts, in this process or another.</summary>
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
                return (0, ""); // It ended meanwhile.
            }
        })];

    /// <summary>Waits, with a deadline, until a count is back where it was: threads end a moment after their tasks complete.</summary>
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
