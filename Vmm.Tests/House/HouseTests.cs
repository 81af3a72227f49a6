using System.Reflection;
using System.Text.RegularExpressions;
using Vmm.Core.Errors;

namespace Vmm.Tests.House;

/// <summary>Rules of this code base that the compiler does not check.</summary>
[TestFixture]
public partial class HouseTests
{
    private const int MaxLines = 600;
    private static readonly string s_root = FindRoot();
    private static readonly string[] s_products = ["Vmm.Core", "Vmm.Migration", "Vmm.Devices.Vfio"];

    /// <summary>Top folder of the sources.</summary>
    internal static string Root => s_root;

    [Test]
    public void NoFileIsOverTheCap() =>
        Assert.That(Sources(s_root).Select(static f => (f, File.ReadAllLines(f).Length)).Where(static x => x.Length > MaxLines), Is.Empty);

    [Test]
    public void UnsafeCodeStaysInItsQuarantine()
    {
        string[] allowed = ["Vmm.Core/Interop/", "Vmm.Core/Buffers/", "Vmm.Core/Memory/"];
        IEnumerable<string> bad = from file in Sources(s_root)
                                  let relative = Relative(file)
                                  where !allowed.Any(a => relative.StartsWith(a, StringComparison.Ordinal)) && !relative.StartsWith("Vmm.Tests/House/", StringComparison.Ordinal)
                                  from line in File.ReadLines(file)
                                  where UnsafeWords().IsMatch(WithoutComment(line))
                                  select $"{relative}: {line.Trim()}";
        Assert.That(bad, Is.Empty);
        Assert.That(Directory.GetFiles(s_root, "*.csproj", SearchOption.AllDirectories).Where(f => File.ReadAllText(f).Contains("AllowUnsafeBlocks")).Select(Relative),
            Is.EqualTo((string[])["Vmm.Core/Vmm.Core.csproj"]));
    }

    [Test]
    public void EveryFileWithUnsafeCodeSaysWhyItIsSafe()
    {
        IEnumerable<string> bad = from file in Sources(Path.Combine(s_root, "Vmm.Core"))
                                  let text = File.ReadAllText(file)
                                  where Regex.IsMatch(text, @"\bunsafe\b(?! code)") && text.Contains('*') && Regex.IsMatch(text, @"^\s+(fixed \(|.*\*\)|byte\* )", RegexOptions.Multiline)
                                  where !text.Contains("// SAFETY:")
                                  select Relative(file);
        Assert.That(bad, Is.Empty);
    }

    [Test]
    public void PluginAndEngineMeetOnlyInCore()
    {
        Assert.That(References(typeof(Migration.MigrationServiceExtensions)), Is.EqualTo((string[])["Vmm.Core"]));
        Assert.That(References(typeof(Devices.Vfio.VfioPlugin)), Is.SubsetOf((string[])["Vmm.Core"]));
        Assert.That(References(typeof(VmmException)), Is.Empty);
    }

    [Test]
    public void ProductsDoNotWriteToTheConsole() =>
        Assert.That(from product in s_products
                    from file in Sources(Path.Combine(s_root, product))
                    where File.ReadLines(file).Any(static l => Regex.IsMatch(WithoutComment(l), @"\bConsole\."))
                    select Relative(file), Is.Empty);

    [Test]
    public void TestsDoNotSleep() =>
        Assert.That(from file in Sources(Path.Combine(s_root, "Vmm.Tests"))
                    where !Relative(file).StartsWith("Vmm.Tests/House/", StringComparison.Ordinal)
                    where File.ReadLines(file).Any(static l => Regex.IsMatch(WithoutComment(l), @"Thread\.Sleep|Task\.Delay"))
                    select Relative(file), Is.Empty);

    [Test]
    public void TheErrorTableIsTotal()
    {
        string table = string.Concat(s_products.Select(static p => Path.Combine(s_root, p, "ERRORS.md")).Where(File.Exists).Select(File.ReadAllText));
        Type[] types = [.. s_products.Select(Assembly.Load).SelectMany(static a => a.GetTypes()).Where(static t => t.IsSubclassOf(typeof(VmmException)) && !t.IsAbstract)];
        Assert.That(types, Has.Length.GreaterThan(8));
        foreach (Type type in types)
        {
            Match row = Regex.Match(table, $@"^\| `{type.Name}` \| .* \| (\S+|the OS errno) \| (.+) \|$", RegexOptions.Multiline);
            Assert.That(row.Success, $"ERRORS.md lacks {type.Name}");
            ConstructorInfo? simple = type.GetConstructor([typeof(string), typeof(Exception)]);
            if (simple is null) continue;
            var error = (VmmException)simple.Invoke(["x", null]);
            Assert.That(error.Errno.ToString(), Is.EqualTo(row.Groups[1].Value), type.Name);
            Assert.That(error.QmpClass.ToString(), Is.EqualTo(row.Groups[2].Value), type.Name);
            Assert.That(error.Message, Is.EqualTo("x"));
        }
    }

    [Test]
    public void FilesNamedInPagesExist()
    {
        var bad = new List<string>();
        foreach (string page in Directory.GetFiles(s_root, "*.md", SearchOption.AllDirectories).Where(static f => !f.Contains("/Golden/") && !f.Contains("/bin/") && !f.Contains("/obj/")))
        {
            foreach (Match name in NamedFiles().Matches(File.ReadAllText(page)))
            {
                string file = name.Groups[1].Value;
                if (!File.Exists(Path.Combine(Path.GetDirectoryName(page)!, file)) && !File.Exists(Path.Combine(s_root, file))) bad.Add($"{Relative(page)}: {file}");
            }
        }
        Assert.That(bad, Is.Empty);
    }

    [Test]
    public void NoTrackedTextNamesAMachinePathOrARegistryHost() =>
        Assert.That(from file in Directory.EnumerateFiles(s_root, "*", SearchOption.AllDirectories)
                    let relative = Relative(file)
                    where Regex.IsMatch(relative, @"\.(cs|md|csproj|props|json)$|^tools/[^.]+$|^\.ci/") && !Regex.IsMatch(relative, @"(^|/)(bin|obj|\.git)/|Golden/|^Vmm\.Tests/House/")
                    from line in File.ReadLines(file)
                    where Regex.IsMatch(line, @"(?<![\w.])/work/|deb\.debian\.org|nuget\.org|npmjs")
                    select $"{relative}: {line.Trim()}", Is.Empty);

    [GeneratedRegex(@"\bunsafe\b|LibraryImport|DllImport|\bUnsafe\.|MemoryMarshal|\bstackalloc\b.*\*")]
    private static partial Regex UnsafeWords();

    [GeneratedRegex(@"`((?:[\w.-]+/)*[\w.-]+\.(?:cs|md|csproj|sln|props))`")]
    private static partial Regex NamedFiles();

    private static IEnumerable<string> References(Type type) =>
        type.Assembly.GetReferencedAssemblies().Select(static a => a.Name!).Where(static n => n.StartsWith("Vmm.", StringComparison.Ordinal));

    private static IEnumerable<string> Sources(string folder) =>
        Directory.EnumerateFiles(folder, "*.cs", SearchOption.AllDirectories).Where(static f => !f.Contains("/obj/") && !f.Contains("/bin/"));

    private static string Relative(string path) => Path.GetRelativePath(s_root, path);

    private static string WithoutComment(string line)
    {
        int at = line.IndexOf("//", StringComparison.Ordinal);
        return at < 0 ? line : line[..at];
    }

    private static string FindRoot()
    {
        string? at = AppContext.BaseDirectory;
        while (at is not null && !File.Exists(Path.Combine(at, "Vmm.sln"))) at = Path.GetDirectoryName(at);
        return at ?? throw new InvalidOperationException("the tests run outside the source tree");
    }
}
