using System.Reflection;
using System.Text.RegularExpressions;
using System.Xml.Linq;

namespace Vmm.Tests.House;

/// <summary>The public surface is small, listed and documented: what is public stays, so it is public on purpose.</summary>
[TestFixture]
public sealed partial class PublicSurfaceTests
{
    private const int MaxTypes = 200;

    private static readonly Assembly[] s_libraries =
    [
        typeof(Core.Errors.VmmException).Assembly, typeof(Devices.Vfio.VfioPlugin).Assembly, typeof(Migration.MigrationServiceExtensions).Assembly,
    ];

    [Test]
    public void ThePublicSurfaceStaysSmall()
    {
        int[] counts = [.. s_libraries.Select(static a => a.GetExportedTypes().Length)];
        Assert.That(counts.Sum(), Is.LessThanOrEqualTo(MaxTypes), () => string.Join(", ", s_libraries.Zip(counts, static (a, n) => $"{a.GetName().Name} {n}")));
    }

    [TestCaseSource(nameof(s_libraries))]
    public void ThePublicSurfaceIsListed(Assembly library)
    {
        string[] listed = File.ReadAllLines(Path.Combine(HouseTests.Root, library.GetName().Name!, "PublicAPI.Shipped.txt"));
        Assert.That(listed[0], Is.EqualTo("#nullable enable"));
        Assert.That(listed, Has.Length.GreaterThan(library.GetExportedTypes().Length));
    }

    [TestCaseSource(nameof(s_libraries))]
    public void WhatIsPublicHasASummary(Assembly library)
    {
        Dictionary<string, XElement> documentation = Documentation(library);
        string[] bare =
        [
            .. from type in library.GetExportedTypes()
               from id in (string[])[$"T:{Id(type)}", .. Members(type)]
               where !documentation.Any(d => (d.Key == id || d.Key.StartsWith(id + "(", StringComparison.Ordinal) || d.Key.StartsWith(id + "``", StringComparison.Ordinal)) && IsDocumented(d.Value))
               select id,
        ];
        Assert.That(bare, Is.Empty);
    }

    /// <summary>The name is in the signature; a text that repeats it costs a line and says nothing.</summary>
    [TestCaseSource(nameof(s_libraries))]
    public void NoParameterIsDescribedByItsNameAlone(Assembly library)
    {
        HashSet<string> types = [.. library.GetExportedTypes().Select(Id)];
        string[] empty =
        [
            .. from member in Documentation(library).Values
               where types.Contains(Owner((string)member.Attribute("name")!))
               from parameter in member.Elements("param")
               where Words(parameter.Value).Except(Words((string)parameter.Attribute("name")!)).Except(["the", "a", "an", "its", "of"]).FirstOrDefault() is null
               where !parameter.Elements().Any()
               select $"{(string)member.Attribute("name")!}: {(string)parameter.Attribute("name")!}",
        ];
        Assert.That(empty, Is.Empty);
    }

    private static Dictionary<string, XElement> Documentation(Assembly library) =>
        XDocument.Load(Path.ChangeExtension(library.Location, ".xml")).Descendants("member").ToDictionary(static m => (string)m.Attribute("name")!);

    private static bool IsDocumented(XElement member) =>
        member.Element("inheritdoc") is not null || member.Element("summary") is { } summary && (summary.Elements().Any() || Words(summary.Value).Length > 0);

    /// <summary>The type of <c>T:A.B</c> or <c>M:A.B.C(D.E)</c>.</summary>
    private static string Owner(string id)
    {
        string name = id[2..].Split('(')[0];
        return id[0] == 'T' ? name : name[..name.LastIndexOf('.')];
    }

    private static string Id(Type type) => type.FullName!.Replace('+', '.');

    private static IEnumerable<string> Members(Type type)
    {
        const BindingFlags All = BindingFlags.Public | BindingFlags.NonPublic | BindingFlags.Instance | BindingFlags.Static | BindingFlags.DeclaredOnly;
        bool isRecord = type.GetMethod("PrintMembers", All) is not null || type.GetMethod("<Clone>$", All) is not null;
        foreach (FieldInfo field in type.GetFields(All).Where(static f => (f.IsPublic || f.IsFamily) && !f.IsSpecialName)) yield return $"F:{Id(type)}.{field.Name}";
        foreach (PropertyInfo property in type.GetProperties(All).Where(static p => p.GetAccessors(true).Any(static m => m.IsPublic || m.IsFamily) && p.Name != "EqualityContract"))
        {
            // A positional record documents its members as parameters.
            if (!isRecord || !type.GetConstructors().Any(c => c.GetParameters().Any(p => p.Name == property.Name))) yield return $"P:{Id(type)}.{property.Name}";
        }
        foreach (EventInfo one in type.GetEvents(All).Where(static e => e.AddMethod is { IsPublic: true })) yield return $"E:{Id(type)}.{one.Name}";
        if (type.IsSubclassOf(typeof(Delegate))) yield break;
        foreach (MethodInfo method in type.GetMethods(All).Where(static m => (m.IsPublic || m.IsFamily) && !m.IsSpecialName && !m.Name.Contains('.')))
        {
            bool isMade = isRecord && (method.Name is "ToString" or "Equals" or "GetHashCode" or "Deconstruct" or "PrintMembers" or "<Clone>$");
            if (!isMade) yield return $"M:{Id(type)}.{method.Name}";
        }
    }

    private static string[] Words(string text) => [.. Word().Matches(text).Select(static m => m.Value.ToLowerInvariant())];

    [GeneratedRegex("[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")]
    private static partial Regex Word();
}
