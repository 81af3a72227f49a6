using System.Globalization;

namespace Vmm.Tools.Bench;

/// <summary>CPU time of another process, from /proc, which measures vmm and QEMU with the same clock.</summary>
internal static class Cpu
{
    internal static double Seconds(int pid)
    {
        string stat = File.ReadAllText($"/proc/{pid}/stat");
        string[] fields = stat[(stat.LastIndexOf(')') + 2)..].Split(' ');
        return (long.Parse(fields[11], CultureInfo.InvariantCulture) + long.Parse(fields[12], CultureInfo.InvariantCulture)) / 100.0;
    }
}
