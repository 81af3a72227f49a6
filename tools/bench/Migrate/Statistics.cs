namespace Vmm.Tools.Bench.Migrate;

/// <summary>Figures of a series.</summary>
internal static class Statistics
{
    /// <summary>The middle value, or the mean of the two in the middle; NaN without values.</summary>
    internal static double Median(IEnumerable<double> values)
    {
        double[] sorted = [.. values.Order()];
        if (sorted.Length == 0) return double.NaN;
        int middle = sorted.Length / 2;
        return sorted.Length % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
    }

    /// <summary>The largest value; NaN without values.</summary>
    internal static double Max(IEnumerable<double> values) => values.DefaultIfEmpty(double.NaN).Max();
}
