using System.Text.RegularExpressions;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio;

/// <summary>Our view of the kernel's VFIO and iommufd headers equals a C compiler's.</summary>
internal sealed partial class UapiLayoutTests
{
    /// <summary>Names that the headers of Linux 6.12 lack; they must have all others.</summary>
    private static readonly string[] s_newerThan612 =
    [
        "IOMMU_IOAS_MAP_FILE", "IOMMU_IOAS_CHANGE_PROCESS", "IOMMU_HWPT_ALLOC_PASID", "struct iommu_ioas_map_file", "struct iommu_ioas_change_process",
        "VFIO_DEVICE_FEATURE_DMA_BUF", "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2", "VFIO_DEVICE_FEATURE_ZPCI_ERROR", "VFIO_PRECOPY_INFO_REINIT",
        "VFIO_DEVICE_BIND_FLAG_TOKEN", "struct vfio_device_bind_iommufd, token_uuid_ptr", "struct vfio_device_bind_iommufd.token_uuid_ptr",
        "VFIO_DEVICE_ATTACH_PASID", "struct vfio_device_attach_iommufd_pt, pasid", "struct vfio_device_attach_iommufd_pt.pasid",
        "VFIO_DEVICE_DETACH_PASID", "struct vfio_device_detach_iommufd_pt, pasid", "struct vfio_device_detach_iommufd_pt.pasid",
    ];

    [Test]
    public void Every_size_offset_and_number_is_the_compilers()
    {
        string? headers = Environment.GetEnvironmentVariable("VMM_UAPI_HEADERS");
        if (string.IsNullOrEmpty(headers)) Miss("VMM_UAPI_HEADERS is not set; tools/lab/headers brings kernel headers of 6.12 or later");
        if (!File.Exists(Path.Combine(headers!, "linux/iommufd.h"))) Miss($"'{headers}' has no linux/iommufd.h");
        using var folder = new TempDirectory();
        List<UapiItem> all = UapiItems.All(), missing = Missing(folder, headers!, all), there = [.. all.Except(missing)];
        TestContext.Out.WriteLine($"{there.Count} of {all.Count} items checked; these headers are older than: {string.Join("; ", missing.Select(static i => i.Name))}");

        Assert.That(missing.Select(static i => i.Name).Where(static n => !IsNewer(n)), Is.Empty, "Linux 6.12 has these");
        Assert.That(there, Has.Count.GreaterThanOrEqualTo(all.Count(static i => !IsNewer(i.Name))));
        Dictionary<string, ulong> theirs = Ask(folder, Prologue(headers!), Include(headers!), there);
        Assert.That(there.Where(i => theirs[i.Name] != Expected(i, missing)).Select(i => $"{i.Name}: ours {Expected(i, missing)}, theirs {theirs[i.Name]}"), Is.Empty);
    }

    [Test]
    public void Every_number_that_the_seam_shows_has_a_row() => Assert.That(UapiItems.Unlisted(), Is.Empty);

    private static bool IsNewer(string name) => s_newerThan612.Any(n => name == n || name.Contains($"{n})", StringComparison.Ordinal) || name.Contains($"({n},", StringComparison.Ordinal)
        || (name.Contains($"({n}.", StringComparison.Ordinal) && !n.Contains('.')));

    /// <summary>The value that these headers give; in older headers, a structure that has grown since ends where its first missing field begins.</summary>
    private static ulong Expected(UapiItem item, List<UapiItem> missing)
    {
        if (item.Structure is null || item.Name != $"sizeof({item.Structure})") return item.Ours;
        UapiItem[] fields = [.. missing.Where(m => m.Structure == item.Structure && m.Name.StartsWith("offsetof", StringComparison.Ordinal))];
        return fields.Length == 0 ? item.Ours : fields.Min(static f => f.Ours);
    }

    /// <summary>Finds the items that do not compile. Each has a line of its own, so the compiler's line numbers name them.</summary>
    private static List<UapiItem> Missing(TempDirectory folder, string headers, List<UapiItem> items)
    {
        string source = folder["probe.c"];
        File.WriteAllText(source, Prologue(headers) + "unsigned long long items[] = {\n#line 1 \"items\"\n" + string.Join('\n', items.Select(static i => $"{i.Expression},")) + "\n};\n");
        (_, _, string errors) = Gcc(Include(headers), "-fsyntax-only", "-fmax-errors=0", source);
        return [.. ErrorLine().Matches(errors).Select(static m => int.Parse(m.Groups[1].Value)).Distinct().Select(n => items[n - 1])];
    }

    /// <summary>Asks a C compiler for the value of each item.</summary>
    internal static Dictionary<string, ulong> Ask(TempDirectory folder, string prologue, string[] include, List<UapiItem> items)
    {
        string source = folder["print.c"], program = folder["print"];
        File.WriteAllText(source, prologue + "#include <stdio.h>\nint main(void)\n{\n"
            + string.Concat(items.Select(static (i, n) => $"\tprintf(\"{n} %llu\\n\", (unsigned long long)({i.Expression}));\n")) + "\treturn 0;\n}\n");
        (int status, _, string errors) = Gcc(include, "-o", program, source);
        Assert.That(status, Is.Zero, errors);
        (status, string output, _) = Shell.Run(program);
        Assert.That(status, Is.Zero);
        return output.Split('\n', StringSplitOptions.RemoveEmptyEntries).Select(static l => l.Split(' ')).ToDictionary(l => items[int.Parse(l[0])].Name, static l => ulong.Parse(l[1]));
    }

    private static string Prologue(string headers) => $"#include <stddef.h>\n#include \"{headers}/linux/vfio.h\"\n#include \"{headers}/linux/iommufd.h\"\n";

    private static string[] Include(string headers) => ["-isystem", headers];

    private static (int Status, string Output, string Errors) Gcc(string[] include, params string[] arguments)
    {
        try
        {
            return Shell.Run("gcc", ["-std=gnu11", "-Wall", .. include, .. arguments]);
        }
        catch (System.ComponentModel.Win32Exception e)
        {
            Miss($"gcc cannot be run: {e.Message}");
            throw;
        }
    }

    private static void Miss(string reason)
    {
        if (!string.IsNullOrEmpty(Environment.GetEnvironmentVariable("CI"))) Assert.Fail(reason);
        Assert.Ignore(reason);
    }

    [GeneratedRegex(@"^items:(\d+):\d+: error:", RegexOptions.Multiline)]
    private static partial Regex ErrorLine();
}
