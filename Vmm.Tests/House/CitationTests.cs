using System.Reflection;
using System.Text.RegularExpressions;

namespace Vmm.Tests.House;

/// <summary>Each citation of docs/spec has a target, and all have the same form. Good and bad samples test the finder itself.</summary>
[TestFixture]
public sealed partial class CitationTests
{
    private static readonly string s_spec = Path.Combine(HouseTests.Root, "docs", "spec");
    private static readonly Dictionary<string, HashSet<string>> s_targets =
        CitationFinder.Files.ToDictionary(static x => x.Key, static x => CitationFinder.Definitions(Read(x.Value)).Select(static d => d.Target).ToHashSet());

    [Test]
    public void EveryCitationHasItsTarget()
    {
        int count = 0;
        var bad = new List<string>();
        foreach ((string name, string text) in Texts())
        {
            foreach (CitationFinder.Citation citation in CitationFinder.Citations(text))
            {
                count++;
                if (!s_targets[citation.Document].Contains(citation.Target)) bad.Add($"{name}:{citation.Line}: docs/spec/{CitationFinder.Files[citation.Document]} has no {citation.Target}");
            }
        }
        Assert.That(bad, Is.Empty);
        Assert.That(count, Is.GreaterThan(300), "the finder finds too few citations");
    }

    [Test]
    public void NoCitationHasAnotherForm() =>
        Assert.That(from text in Texts()
                    where !text.Name.StartsWith("docs/spec/", StringComparison.Ordinal)
                    from other in CitationFinder.OtherForms(text.Text)
                    select $"{text.Name}:{other.Line}: {other.Text.Trim()}: {other.What}", Is.Empty);

    [Test]
    public void ADocumentsReferencesToItselfHaveTheirTargets() =>
        Assert.That(from document in CitationFinder.Files
                    from reference in CitationFinder.OwnReferences(Read(document.Value))
                    where !s_targets[document.Key].Contains(reference.Target)
                    select $"docs/spec/{document.Value}:{reference.Line}: no {reference.Target}", Is.Empty);

    [Test]
    public void NothingIsDefinedTwice() =>
        Assert.That(from document in CitationFinder.Files
                    from definition in CitationFinder.Definitions(Read(document.Value)).GroupBy(static d => d.Target)
                    where definition.Count() > 1
                    select $"docs/spec/{document.Value}: {definition.Key}, lines {string.Join(", ", definition.Select(static d => d.Line))}", Is.Empty);

    /// <summary>Names of lab tests contain the section of vfio-migration that the test shows, and that section must exist.</summary>
    [Test]
    public void TestsNamedAfterASectionHaveTheirTarget()
    {
        (string Name, string Section)[] named =
            [.. from type in typeof(CitationTests).Assembly.GetTypes()
                from method in type.GetMethods(BindingFlags.Public | BindingFlags.Instance | BindingFlags.DeclaredOnly)
                let section = SectionInName().Match(method.Name)
                where section.Success
                select ($"{type.Name}.{method.Name}", section.Groups[1].Value.Replace('_', '.'))];
        Assert.That(named, Has.Length.GreaterThan(40));
        Assert.That(named.Where(static x => !s_targets["vfio-migration"].Contains(x.Section)), Is.Empty);
    }

    [TestCase("/// The order (stream 1.3).", "stream 1.3")]
    [TestCase("// stream 17.2: peers die of it", "stream 17.2")]
    [TestCase("(vfio-migration 3.1.7; QEMU: vfio_realize)", "vfio-migration 3.1.7")]
    [TestCase("(vfio-user S-30 and S-33)", "vfio-user S-30|vfio-user S-33")]
    [TestCase("(stream 1.1, 1.2)", "stream 1.1|stream 1.2")]
    [TestCase("(qmp 8.2 to 8.7)", "qmp 8.2|qmp 8.7")]
    [TestCase("(stream 4; vfio-migration 3.7)", "stream 4|vfio-migration 3.7")]
    [TestCase("as lab L-3 says, and qmp 10.", "lab L-3|qmp 10")]
    [TestCase("/// the end (vfio-user\n    /// S-41,\n    /// 8.4)", "vfio-user S-41|vfio-user 8.4")]
    [TestCase("a bitstream 3.4, stream3 and mystream 2; docs/stream 1", "")]
    [TestCase("a stream of 3 bytes, the lab's 12 tests", "")]
    public void CitationsAreFound(string text, string expected) =>
        Assert.That(string.Join('|', CitationFinder.Citations(text).Select(static c => $"{c.Document} {c.Target}")), Is.EqualTo(expected));

    [Test]
    public void ACitationHasTheLineOfItsTarget() =>
        Assert.That(CitationFinder.Citations("// one\n// two (stream 1.1,\n// 9.9)").Select(static c => (c.Line, c.Target)), Is.EqualTo(((int, string)[])[(2, "1.1"), (3, "9.9")]));

    [TestCase("(spec 3.6)")]
    [TestCase("/// <summary>Spec 2.3: a predicate decides.</summary>")]
    [TestCase("(spec vfio-migration 3.6)")]
    [TestCase("what the spec shows")]
    [TestCase("(spec\n/// vfio-user 3.1)")]
    [TestCase("(qmp.md 8.2)")]
    [TestCase("(qmp.md section 10)")]
    [TestCase("see docs/spec/qmp.md 8.2")]
    [TestCase("(qmp section 8)")]
    [TestCase("(stream trap 2)")]
    [TestCase("trap 15: prefixes are plain")]
    [TestCase("(S-41)")]
    [TestCase("// C-13: refuse")]
    [TestCase("(vfio-user 8; S-49)")]
    [TestCase("(vfio-user S-57) and C-3")]
    [TestCase("(QMP 8.2)")]
    [TestCase("(Stream 3.6)")]
    [TestCase("(vfio-lab L-3)")]
    [TestCase("(qemu-migration-stream 3.6)")]
    public void OtherFormsAreFound(string text) => Assert.That(CitationFinder.OtherForms(text), Is.Not.Empty);

    [TestCase("(stream 3.6), (vfio-user S-41, C-3), (vfio-migration 1.7, 1.11 and 2)")]
    [TestCase("[the page](docs/spec/qmp.md), docs/spec/vfio-migration.md, docs/specs/edu")]
    [TestCase("using Spectre.Console; a special form, unspecified")]
    [TestCase("UTF-8, LV-1, SHA-256, ISO-8859-1, AES-C-1, 3-S-2")]
    [TestCase("QEMU 7.2, the QMP client, a trap for it, PART, section 1")]
    public void OrdinaryTextIsNoOtherForm(string text) => Assert.That(CitationFinder.OtherForms(text), Is.Empty);

    [Test]
    public void DefinitionsAreHeadingsAndBoldLabelsOutsideOfCode() =>
        Assert.That(CitationFinder.Definitions("## 3. RAM\n### 3.1 Names\n- **3.1.7** one\n| x | **S-41**: two |\n**bold 7** **[V]** **C-2**, **S-2**\n```\n## 4. no\n```\n# 5. no\n").Select(static d => d.Target),
            Is.EqualTo((string[])["3", "3.1", "3.1.7", "S-41", "C-2", "S-2"]));

    [Test]
    public void ADocumentMayCiteItselfByNumberAndBareLabel() =>
        Assert.That(CitationFinder.OwnReferences("see section 3.2 (S-15), sections 3 and 4\n```\nPART, section 9\n```\n**S-16**: defined").Select(static r => r.Target),
            Is.EqualTo((string[])["3.2", "S-15", "3", "4"]));

    private static string Read(string document) => File.ReadAllText(Path.Combine(s_spec, document));

    /// <summary>All sources and pages. Strings in sources count too, because a reader of a test's failure needs the same citations.</summary>
    private static IEnumerable<(string Name, string Text)> Texts() =>
        from file in Directory.EnumerateFiles(HouseTests.Root, "*", SearchOption.AllDirectories)
        let name = Path.GetRelativePath(HouseTests.Root, file)
        where (name.EndsWith(".cs", StringComparison.Ordinal) || name.EndsWith(".md", StringComparison.Ordinal)) && !NotOurs().IsMatch(name)
        orderby name
        select (name, File.ReadAllText(file));

    /// <summary>Files that are not checked: the output of builds, and this file, whose samples include bad citations.</summary>
    [GeneratedRegex(@"(^|/)(bin|obj|\.git)/|^Vmm\.Tests/House/Citation\w+\.cs$")]
    private static partial Regex NotOurs();

    [GeneratedRegex(@"^Spec(\d+(?:_\d+)*)_")]
    private static partial Regex SectionInName();
}
