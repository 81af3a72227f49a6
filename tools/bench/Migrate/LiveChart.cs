using System.Globalization;
using System.Security;
using System.Text;

namespace Vmm.Tools.Bench.Migrate;

/// <summary>What one program's query-migrate said during a run.</summary>
internal sealed record Curve(string Name, IReadOnlyList<Sample> Samples);

/// <summary>Draws throughput and remaining bytes over time as an SVG that needs no other file and follows the reader's light or dark scheme.</summary>
internal static class LiveChart
{
    private const int Width = 880, Left = 70, Right = 20, PanelHeight = 190, Top = 70, Gap = 60, Ticks = 4, LegendStep = 130;
    private const double SmoothMs = 60;
    private static readonly string[] s_classes = ["a", "b"];

    private static readonly string s_style = """
        <style>
        svg { font: 12px system-ui, sans-serif; fill: #24292f } .bg { fill: #ffffff }
        .grid { stroke: #d0d7de; stroke-width: 1 } .t { font-size: 14px; font-weight: 600 } .m { fill: #57606a }
        .a { stroke: #0969da } .b { stroke: #bc4c00 } polyline { fill: none; stroke-width: 2; stroke-linejoin: round }
        @media (prefers-color-scheme: dark) {
        svg { fill: #e6edf3 } .bg { fill: #0d1117 } .grid { stroke: #30363d } .m { fill: #8d96a0 } .a { stroke: #58a6ff } .b { stroke: #f0883e }
        }
        </style>
        """;

    internal static string Draw(string title, IReadOnlyList<Curve> curves)
    {
        double lastMs = Math.Max(1, curves.SelectMany(static c => c.Samples).Select(static s => (double)s.AtMs).DefaultIfEmpty(1).Max());
        var svg = new StringBuilder();
        int height = Top + (2 * PanelHeight) + Gap + 50;
        svg.Append(CultureInfo.InvariantCulture, $"<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {Width} {height}\" role=\"img\" aria-label=\"{Text(title)}\">\n");
        svg.Append(CultureInfo.InvariantCulture, $"{s_style}\n<rect class=\"bg\" width=\"{Width}\" height=\"{height}\"/>\n");
        svg.Append(CultureInfo.InvariantCulture, $"<text class=\"t\" x=\"{Left}\" y=\"22\">{Text(title)}</text>\n");
        for (int i = 0; i < curves.Count; i++)
        {
            int x = Left + (i * LegendStep);
            svg.Append(CultureInfo.InvariantCulture, $"<polyline class=\"{s_classes[i % 2]}\" points=\"{x},40 {x + 24},40\"/><text x=\"{x + 30}\" y=\"44\">{Text(curves[i].Name)}</text>\n");
        }
        Panel(svg, Top, "throughput, GB/s", curves, lastMs, Throughput);
        Panel(svg, Top + PanelHeight + Gap, "remaining, MB", curves, lastMs, static c => c.Samples.Select(static s => ((double)s.AtMs, s.RemainingBytes / 1e6)));
        svg.Append(CultureInfo.InvariantCulture, $"<text class=\"m\" x=\"{Width - Right}\" y=\"{height - 10}\" text-anchor=\"end\">ms since the start</text>\n</svg>\n");
        return svg.ToString();
    }

    /// <summary>Bytes between two looks over the time between them; looks closer than the programs' own clocks tell apart count as one.</summary>
    internal static IEnumerable<(double AtMs, double Value)> Throughput(Curve curve)
    {
        Sample before = new(0, 0, 0);
        foreach (Sample now in curve.Samples)
        {
            if (now.AtMs - before.AtMs < SmoothMs) continue;
            double rate = (now.TransferredBytes - before.TransferredBytes) / 1e6 / (now.AtMs - before.AtMs);
            yield return ((before.AtMs + now.AtMs) / 2.0, rate);
            before = now;
        }
    }

    private static void Panel(StringBuilder svg, int top, string name, IReadOnlyList<Curve> curves, double lastMs, Func<Curve, IEnumerable<(double AtMs, double Value)>> of)
    {
        double largest = RoundUp(curves.SelectMany(of).Select(static p => p.Value).DefaultIfEmpty(1).Max()), span = RoundUp(lastMs);
        svg.Append(CultureInfo.InvariantCulture, $"<text class=\"m\" x=\"{Left}\" y=\"{top - 8}\">{Text(name)}</text>\n");
        for (int i = 0; i <= Ticks; i++)
        {
            double y = top + (PanelHeight * (1 - (i / (double)Ticks))), x = Left + ((Width - Left - Right) * (i / (double)Ticks));
            svg.Append(CultureInfo.InvariantCulture, $"<line class=\"grid\" x1=\"{Left}\" x2=\"{Width - Right}\" y1=\"{y:F1}\" y2=\"{y:F1}\"/>");
            svg.Append(CultureInfo.InvariantCulture, $"<text class=\"m\" x=\"{Left - 8}\" y=\"{y + 4:F1}\" text-anchor=\"end\">{largest * i / Ticks:0.##}</text>");
            svg.Append(CultureInfo.InvariantCulture, $"<text class=\"m\" x=\"{x:F1}\" y=\"{top + PanelHeight + 18}\" text-anchor=\"middle\">{span * i / Ticks:0.##}</text>\n");
        }
        for (int i = 0; i < curves.Count; i++)
        {
            IEnumerable<string> points = of(curves[i]).Select(p => string.Create(CultureInfo.InvariantCulture,
                $"{Left + (p.AtMs / span * (Width - Left - Right)):F1},{top + (PanelHeight * (1 - (p.Value / largest))):F1}"));
            svg.Append(CultureInfo.InvariantCulture, $"<polyline class=\"{s_classes[i % 2]}\" points=\"{string.Join(' ', points)}\"/>\n");
        }
    }

    /// <summary>The next number with few digits, so that the grid's labels are short.</summary>
    internal static double RoundUp(double value)
    {
        if (value <= 0) return 1;
        double unit = Math.Pow(10, Math.Floor(Math.Log10(value)));
        return unit * ((double[])[1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10]).First(f => f * unit >= value * 0.999999);
    }

    private static string Text(string text) => SecurityElement.Escape(text);
}
