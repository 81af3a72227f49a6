using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;

namespace Vmm.Tools.Cli.Hosting;

/// <summary><c>--memory SIZE[,id=NAME][,file=PATH][,share=on|off][,prealloc=on|off][,hugepages=on|off]</c>, once per RAM block.</summary>
internal static class MemoryOption
{
    private const string Option = "--memory";
    private const ulong DefaultSizeBytes = 128 << 20;

    /// <summary>Parses all <c>--memory</c> options; without any there is one block of 128 MiB. Default names: ram, ram1, ram2 and so on.</summary>
    /// <exception cref="ConfigurationException">An option is malformed; the message names the option and the reason.</exception>
    public static IReadOnlyList<RamBlockOptions> Parse(IReadOnlyList<string> texts)
    {
        if (texts.Count == 0) return [new RamBlockOptions { Name = "ram", SizeBytes = DefaultSizeBytes }];
        var blocks = new List<RamBlockOptions>();
        foreach (string text in texts)
        {
            RamBlockOptions block = ParseOne(text, blocks.Count == 0 ? "ram" : $"ram{blocks.Count}");
            if (blocks.Exists(b => b.Name == block.Name)) throw new ConfigurationException($"{Option} '{text}': id '{block.Name}' is used twice");
            blocks.Add(block);
        }
        return blocks;
    }

    private static RamBlockOptions ParseOne(string text, string defaultName)
    {
        string[] parts = OptionList.Split(text);
        string what = $"{Option} '{text}'";
        string size = parts[0].StartsWith("size=", StringComparison.Ordinal) ? parts[0][5..] : parts[0];
        ulong bytes = OptionList.SizeBytes(size, Option);
        if (bytes == 0 || bytes % RamBlock.PageSize != 0)
            throw new ConfigurationException($"{what}: the size must be a positive multiple of {RamBlock.PageSize} bytes, found {bytes}");
        var block = new RamBlockOptions { Name = defaultName, SizeBytes = bytes };
        var seen = new HashSet<string>(StringComparer.Ordinal);
        foreach (string part in parts.Skip(1))
        {
            (string key, string value) = OptionList.Pair(part, what);
            if (!seen.Add(key)) throw new ConfigurationException($"{what}: '{key}' is given twice");
            string named = $"{what}: '{key}'";
            block = key switch
            {
                "id" => block with { Name = Checked(value, named) },
                "file" => block with { FilePath = value.Length > 0 ? Path.GetFullPath(value) : throw new ConfigurationException($"{named} needs a path") },
                "share" => block with { IsShared = OptionList.Bool(value, named) },
                "prealloc" => block with { Prealloc = OptionList.Bool(value, named) },
                "hugepages" => block with { HugePages = OptionList.Bool(value, named) },
                _ => throw new ConfigurationException($"{what}: '{key}' is not known; known: id, file, share, prealloc, hugepages"),
            };
        }
        return block;
    }

    private static string Checked(string name, string what) =>
        name.Length is > 0 and <= 255 && name.All(static c => c is >= ' ' and <= '~')
            ? name
            : throw new ConfigurationException($"{what} must be 1 to 255 printable ASCII characters");
}
