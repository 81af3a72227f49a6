namespace Vmm.Tests.Model;

/// <summary>What a check found: how many states and steps there are, and the shortest way to a state that breaks an invariant.</summary>
/// <param name="States">Reachable states.</param>
/// <param name="Steps">Steps between them.</param>
/// <param name="Broken">The invariant that does not hold; null if all hold everywhere.</param>
/// <param name="Trace">The steps from the start to the broken state; empty if all hold.</param>
internal sealed record ModelResult(int States, int Steps, string? Broken, IReadOnlyList<string> Trace)
{
    public override string ToString() => Broken is null ? $"{States} states, {Steps} steps, all invariants hold" : $"{Broken}: {string.Join(", ", Trace)}";
}

/// <summary>An explicit-state model checker: it walks every reachable state, breadth first, so that a trace to a fault is a shortest one.</summary>
internal static class ModelChecker
{
    /// <param name="start">The first state. States are compared by value.</param>
    /// <param name="steps">All steps out of a state, each with a name.</param>
    /// <param name="broken">Names the invariant that a state breaks, given the number of steps out of it; null for a good state.</param>
    internal static ModelResult Check<T>(T start, Func<T, IEnumerable<(string Step, T Next)>> steps, Func<T, int, string?> broken)
        where T : notnull
    {
        var seen = new Dictionary<T, int> { [start] = 0 };
        var order = new List<(T State, int From, string Step)> { (start, -1, "start") };
        int taken = 0;
        for (int i = 0; i < order.Count; i++)
        {
            int ways = 0;
            foreach ((string step, T next) in steps(order[i].State))
            {
                ways++;
                taken++;
                if (seen.TryAdd(next, order.Count)) order.Add((next, i, step));
            }
            if (broken(order[i].State, ways) is { } what) return new ModelResult(order.Count, taken, what, Trace(order, i));
        }
        return new ModelResult(order.Count, taken, null, []);
    }

    private static List<string> Trace<T>(List<(T State, int From, string Step)> order, int at)
    {
        var trace = new List<string>();
        for (; order[at].From >= 0; at = order[at].From) trace.Insert(0, order[at].Step);
        return trace;
    }
}
