using System.Diagnostics;
using System.Globalization;
using System.Text.RegularExpressions;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Tests.Lab;

/// <summary>
/// Records the calls to VFIO of all processes with the kernel's tracer, until dispose: ioctls of type1 and devices, and writes to config space.
/// </summary>
internal sealed partial class LabTrace : IDisposable
{
    private const string Root = "/sys/kernel/tracing/", Events = Root + "events/syscalls/";

    /// <summary>Stands for a write to config space in <see cref="Calls"/>.</summary>
    internal const uint ConfigWrite = 0;

    /// <summary>Offsets of region 7 (config space) in a device's file, as vfio-pci lays it out.</summary>
    private const ulong ConfigAt = (ulong)7 << 40, ConfigEnd = (ulong)8 << 40;

    /// <summary>The calls that change a device, its container or its mappings.</summary>
    internal static readonly uint[] Changes =
    [
        ConfigWrite, VfioUapi.VFIO_SET_IOMMU, VfioUapi.VFIO_GROUP_SET_CONTAINER, VfioUapi.VFIO_GROUP_UNSET_CONTAINER, VfioUapi.VFIO_GROUP_GET_DEVICE_FD, VfioUapi.VFIO_DEVICE_SET_IRQS,
        VfioUapi.VFIO_DEVICE_RESET, VfioUapi.VFIO_IOMMU_MAP_DMA, VfioUapi.VFIO_IOMMU_UNMAP_DMA,
    ];

    /// <summary>Count of the trace's lines at the last <see cref="Clear"/>. Only an open with O_TRUNC empties the trace, and .NET does not use it.</summary>
    private int _old;

    internal LabTrace()
    {
        if (!File.Exists(Root + "trace"))
        {
            using Process mount = Process.Start("/bin/mount", ["-t", "tracefs", "tracefs", Root]);
            mount.WaitForExit();
        }
        Write("options/record-tgid", "1");
        Enable("sys_enter_ioctl", $"cmd >= {VfioUapi.VFIO_GET_API_VERSION} && cmd < {VfioUapi.VFIO_GET_API_VERSION + 0x40}");
        Enable("sys_enter_pwrite64", $"pos >= {ConfigAt} && pos < {ConfigEnd}");
        Clear();
    }

    /// <summary>Hides the calls so far.</summary>
    internal void Clear() => _old = Lines().Count();

    /// <summary>The calls of a process, in order.</summary>
    internal uint[] Calls(int pid) =>
        [.. Lines().Skip(_old).Select(static l => Entry().Match(l)).Where(m => m.Groups[1].Value == pid.ToString(CultureInfo.InvariantCulture))
            .Select(static m => m.Groups[2].Value == "ioctl" ? Command(m.Groups[3].Value) : ConfigWrite)];

    /// <summary>Whether the trace names the process of each call.</summary>
    internal bool IsComplete => !Lines().Skip(_old).Any(static l => l.Contains("(-------)", StringComparison.Ordinal));

    public void Dispose()
    {
        Write("events/enable", "0");
        foreach (string one in (string[])["sys_enter_ioctl", "sys_enter_pwrite64"]) File.WriteAllText($"{Events}{one}/filter", "0");
        Write("options/record-tgid", "0");
    }

    private static IEnumerable<string> Lines() => File.ReadAllText(Root + "trace").Split('\n').Where(static l => Entry().IsMatch(l));

    private static void Enable(string what, string filter)
    {
        File.WriteAllText($"{Events}{what}/filter", filter);
        File.WriteAllText($"{Events}{what}/enable", "1");
    }

    private static void Write(string file, string text) => File.WriteAllText(Root + file, text);

    private static uint Command(string arguments) => uint.Parse(CommandOf().Match(arguments).Groups[1].Value, NumberStyles.HexNumber, CultureInfo.InvariantCulture);

    [GeneratedRegex(@"-\d+ +\( *(\d+|-+)\) .*: sys_(ioctl|pwrite64)\((.*)\)")]
    private static partial Regex Entry();

    [GeneratedRegex(@"cmd: (?:0x)?([0-9a-f]+)")]
    private static partial Regex CommandOf();
}
