using System.Xml.Linq;
using Vmm.Tools.Bench.Migrate;

namespace Vmm.Tests.Unit.Bench;

/// <summary>The parts of the migration benchmark that calculate: figures, the table of scenarios, verdicts and the drawing.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class MigrateBenchTests
{
    [TestCase(new double[] { 3, 1, 2 }, 2)]
    [TestCase(new double[] { 4, 1, 3, 2 }, 2.5)]
    [TestCase(new double[] { }, double.NaN)]
    public void TheMedianIsTheMiddle(double[] values, double expected) => Assert.That(Statistics.Median(values), Is.EqualTo(expected));

    [Test]
    public void NamesOfScenariosAndGroupsAreDistinct()
    {
        string[] names = [.. Scenarios.All.Select(static s => s.Name), .. Scenarios.All.Select(static s => s.Group).Distinct().Where(static g => Scenarios.All.All(s => s.Name != g))];
        Assert.That(names, Is.Unique);
        Assert.That(Scenarios.Named(["all"]), Is.EqualTo(Scenarios.All));
        Assert.That(Scenarios.Named(["one", "throughput"]).Select(static s => s.Name), Is.Unique.And.Contains("multifd8"));
        Assert.That(() => Scenarios.Named(["none"]), Throws.ArgumentException.With.Message.Contains("multifd2"));
    }

    [Test]
    public void ARatioIsThePeersMedianOverOursAndIgnoresRunsThatDidNotComplete()
    {
        Series ours = new("vmm", 2, [Run(100, 1), Run(300, 3), Run(200, 2), new RunResult(RunOutcome.NotConverged) { TotalMs = 9999 }]);
        ScenarioResult result = ScenarioResult.Of(Scenarios.Named(["one"])[0], 2048, ours, new Series("QEMU", 2, [Run(300, 1)]), 10);
        Assert.That(result.Ratio, Is.EqualTo(1.5));
        Assert.That(result.CpuRatio, Is.EqualTo(2));
        Assert.That(ours.LongestDowntimeMs, Is.EqualTo(3));
        Assert.That(ours.Converges, Is.False);
        Assert.That(ours.GBps, Is.EqualTo(10.73741824).Within(1e-9));
        Assert.That(result.Verdicts.Select(static v => (v.What, v.Holds)), Is.EqualTo(((string, bool)[])[("ratio", true), ("CPU ratio", false)]));
    }

    [Test]
    public void AConditionWithoutAFigureDoesNotHold()
    {
        ScenarioResult refused = ScenarioResult.Of(Scenarios.Named(["multifd4"])[0], 2048, new Series("vmm", 2, [new RunResult(RunOutcome.Refused) { Text = "no" }]), null, null);
        Assert.That(refused.Vmm.Refused, Is.EqualTo("no"));
        Assert.That(refused.Ratio, Is.Null);
        Assert.That(refused.Verdicts.Select(static v => v.Holds), Is.EqualTo((bool[])[false, false, false]));
    }

    [Test]
    public void TheDrawingHasTwoCurvesForEachProgramAndBothSchemes()
    {
        Curve curve = new("a < b", [new Sample(100, 100_000_000, 900), new Sample(120, 110_000_000, 800), new Sample(200, 300_000_000, 0)]);
        XDocument svg = XDocument.Parse(LiveChart.Draw("t & u", [curve, curve with { Name = "c" }]));
        XNamespace ns = "http://www.w3.org/2000/svg";
        Assert.That(svg.Descendants(ns + "polyline").Count(), Is.EqualTo(6), "with the legend's");
        Assert.That(svg.Descendants(ns + "text").Select(static t => t.Value), Is.SupersetOf((string[])["t & u", "a < b"]));
        Assert.That(svg.Descendants(ns + "style").Single().Value, Does.Contain("prefers-color-scheme: dark"));
        Assert.That(LiveChart.Throughput(curve), Is.EqualTo(((double, double)[])[(50, 1), (150, 2)]), "looks within 60 ms count as one");
    }

    [Test]
    public void HalfZeroRamIsHalfZeroInRunsAndInterleaved()
    {
        using var ram = new RamFile("half-test", 8);
        ram.Fill(RamContent.HalfZero);
        bool[] zero = [.. File.ReadAllBytes(ram.Path).Chunk(4096).Select(static p => p.All(static b => b == 0))];
        Assert.That(zero.Count(static z => z), Is.EqualTo(zero.Length / 2));
        Assert.That(zero[..1024].Zip(zero[1..1024]).Count(static p => p.First != p.Second), Is.EqualTo(3), "runs in the lower half");
        Assert.That(zero[1024..].Zip(zero[1025..]).All(static p => p.First != p.Second), "every other page in the upper half");
    }

    [Test]
    public void TheFirstPageThatDiffersIsFound()
    {
        using RamFile from = new("from-test", 8), to = new("to-test", 8);
        from.Fill(RamContent.Random);
        File.Copy(from.Path, to.Path, overwrite: true);
        Assert.That(RamFile.FirstDifference(from, to), Is.Null);
        using (FileStream stream = File.OpenWrite(to.Path))
        {
            stream.Position = (1500 * 4096) + 4095;
            stream.WriteByte((byte)~File.ReadAllBytes(from.Path)[stream.Position]);
        }
        Assert.That(RamFile.FirstDifference(from, to), Is.EqualTo(1500));
        to.Clear();
        Assert.That(RamFile.FirstDifference(from, to), Is.EqualTo(0));
    }

    [TestCase(0.7, 0.8)]
    [TestCase(2, 2)]
    [TestCase(2147, 2400)]
    [TestCase(0, 1)]
    public void AnAxisEndsAtAShortNumber(double value, double expected) => Assert.That(LiveChart.RoundUp(value), Is.EqualTo(expected).Within(1e-9));

    private static RunResult Run(double totalMs, double each) =>
        new(RunOutcome.Completed) { TotalMs = totalMs, DowntimeMs = each, SourceCpuSeconds = each / 2, DestinationCpuSeconds = each / 2 };
}
