using System.Diagnostics;

namespace Vmm.Tests.Support;

/// <summary>Counts what a piece of work leaves behind: descriptors that are not the runtime's own, migration threads, files of a folder.</summary>
internal static class LeakCheck
{
    /// <summary>Descriptors of sockets, pipes, eventfds, memfds and files outside the runtime's folders.</summary>
    internal static List<string> Descriptors()
    {
        var list = new List<string>();
        foreach (string fd in Directory.GetFiles("/proc/self/fd"))
        {
            string? target = new FileInfo(fd).LinkTarget;
            if (target is null || target.EndsWith(".dll", StringComparison.Ordinal) || target.EndsWith(".so", StringComparison.Ordinal)) continue;
            if (target.StartsWith("/dev/", StringComparison.Ordinal) || target.Contains("doublemapper", StringComparison.Ordinal) || target.StartsWith("/proc/", StringComparison.Ordinal)) continue;
            list.Add(target);
        }
        return list;
    }

    /// <summary>Names of threads that the product starts.</summary>
    internal static List<string> Threads() =>
        [.. Directory.GetDirectories("/proc/self/task").Select(static t =>
        {
            try
            {
                return File.ReadAllText(Path.Combine(t, "comm")).Trim();
            }
            catch (IOException)
            {
                return ""; // It ended meanwhile.
            }
        }).Where(static n => n.StartsWith("mig/", StringComparison.Ordinal) || n == "live_migration")];

    /// <summary>Waits, with a deadline, until a count is back where it was: threads end a moment after their tasks complete.</summary>
    internal static void WaitFor(Func<bool> condition, string what)
    {
        var clock = Stopwatch.StartNew();
        while (!condition())
        {
            if (clock.Elapsed > TimeSpan.FromSeconds(5)) Assert.Fail(what);
            Thread.Yield();
        }
    }
}
