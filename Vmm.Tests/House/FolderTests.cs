using Vmm.Tests.House.Sample.High;
using Vmm.Tests.House.Sample.Low;

namespace Vmm.Tests.House;

/// <summary>A folder uses only folders in lower rows of <see cref="FolderRules"/>, so that no circle exists. docs/architecture.md draws the rows.</summary>
[TestFixture]
internal sealed class FolderTests
{
    private static IEnumerable<TestCaseData> Assemblies => FolderRules.All.Select(static r => new TestCaseData(r).SetArgDisplayNames(r.Name));

    [TestCaseSource(nameof(Assemblies))]
    public void FoldersUseOnlyThoseBelowThem(FolderRules rules) =>
        Assert.That(rules.Broken([.. InAssembly(rules), .. FolderArrows.InSources(Sources(rules), rules.RootNamespace)]), Is.Empty);

    [TestCaseSource(nameof(Assemblies))]
    public void EveryFolderIsInARow(FolderRules rules) =>
        Assert.That(Sources(rules).Select(f => Folder(rules, f)).Distinct(), Is.EquivalentTo(rules.Rows.SelectMany(static r => r)));

    [TestCaseSource(nameof(Assemblies))]
    public void ANamespaceIsTheFoldersPath(FolderRules rules)
    {
        IEnumerable<string> bad = from file in Sources(rules)
                                  let folder = Folder(rules, file)
                                  let found = FolderArrows.NamespaceOf(File.ReadAllText(file))
                                  // Top-level statements and assembly attributes have no namespace.
                                  where found.Length > 0 && found != (folder == "." ? rules.RootNamespace : $"{rules.RootNamespace}.{folder}")
                                  select $"{Path.GetRelativePath(HouseTests.Root, file)}: {found}";
        Assert.That(bad, Is.Empty);
    }

    [TestCaseSource(nameof(Assemblies))]
    public void ThePageDrawsTheRows(FolderRules rules)
    {
        string[] page = File.ReadAllLines(Path.Combine(HouseTests.Root, "docs/architecture.md"));
        Assert.That(ArchitectureDrawing.Rows(page, rules.Name), Is.EqualTo(rules.Rows.Reverse()), $"box '{rules.Name}' of docs/architecture.md, top to bottom");
    }

    [Test]
    public void AnArrowThatIsTurnedRoundIsNamed()
    {
        FolderRules rules = Made([["Low"], ["Middle", "Beside"], ["High"]]);
        Assert.That(rules.Broken([new("High", "Low", "A", "B"), new("Middle", "Low", "A", "B")]), Is.Empty);
        Assert.That(rules.Broken([new("High", "Low", "A", "B"), new("Low", "High", "Reader", "Engine")]),
            Is.EqualTo((string[])["made up: Low may not use High: Reader uses Engine"]));
    }

    [Test]
    public void FoldersOfOneRowMayNotUseEachOther() =>
        Assert.That(Made([["Low"], ["Middle", "Beside"]]).Broken([new("Middle", "Beside", "A", "B")]), Has.Count.EqualTo(1));

    [Test]
    public void AFolderInNoRowIsNamed() =>
        Assert.That(Made([["Low"]]).Broken([new("New", "Low", "A", "B"), new("Low", "Newer", "A", "B")]), Has.Count.EqualTo(2));

    [Test]
    public void EveryWayToUseATypeIsAnArrow()
    {
        IEnumerable<string> used = FolderArrows.InAssembly(typeof(HighUser).Assembly.Location, "Vmm.Tests.House.Sample")
            .Where(static a => a is { From: "High", To: "Low", User: nameof(HighUser) }).Select(static a => a.Used);
        Assert.That(used, Is.EquivalentTo(typeof(LowBase).Assembly.GetTypes().Where(static t => t.Namespace == typeof(LowBase).Namespace).Select(static t => t.Name)));
    }

    [Test]
    public void AUsingIsAnArrowToItsNamespaceOrToItsTypes()
    {
        using var folder = new Support.TempDirectory();
        File.WriteAllText(folder["Low.cs"], "namespace A.Low;\n");
        File.WriteAllText(folder["High.cs"], "using System.Text;\nusing A.Low;\nusing static A.Low.Names;\nusing N = A.Low.Numbers;\nusing A.High;\nnamespace A.High;\n");
        Assert.That(FolderArrows.InSources([folder["Low.cs"], folder["High.cs"]], "A"), Is.EquivalentTo((FolderArrow[])
        [
            new("High", "Low", "High.cs", "using A.Low"), new("High", "Low", "High.cs", "using A.Low.Names"), new("High", "Low", "High.cs", "using A.Low.Numbers"),
        ]));
    }

    private static FolderRules Made(string[][] rows) => new("made up", "", "", rows);

    private static IReadOnlyCollection<FolderArrow> InAssembly(FolderRules rules)
    {
        IReadOnlyCollection<FolderArrow> arrows = FolderArrows.InAssembly(Path.Combine(Path.GetDirectoryName(typeof(FolderTests).Assembly.Location)!, rules.AssemblyFile), rules.RootNamespace);
        Assert.That(arrows, Has.Count.GreaterThan(20), "the reader finds too few arrows, so that the other tests prove nothing");
        return arrows;
    }

    private static List<string> Sources(FolderRules rules) => [.. Directory.EnumerateFiles(Path.Combine(HouseTests.Root, rules.Name), "*.cs", SearchOption.AllDirectories)
        .Where(static f => !f.Contains("/obj/", StringComparison.Ordinal) && !f.Contains("/bin/", StringComparison.Ordinal))];

    private static string Folder(FolderRules rules, string file) =>
        Path.GetDirectoryName(Path.GetRelativePath(Path.Combine(HouseTests.Root, rules.Name), file)) is { Length: > 0 } folder ? folder.Replace('/', '.') : ".";
}
