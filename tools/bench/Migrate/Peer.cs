namespace Vmm.Tools.Bench.Migrate;

/// <summary>A program that runs VMs.</summary>
/// <param name="Name">Name in the results.</param>
/// <param name="Path">The program.</param>
/// <param name="IsVmm">Whether it is <c>vmm</c>; otherwise it is a QEMU.</param>
internal sealed record Peer(string Name, string Path, bool IsVmm)
{
    /// <summary>Capabilities that both ends get, besides those of the scenario.</summary>
    internal IReadOnlyList<string> Capabilities { get; init; } = [];

    /// <summary>Parameters that both ends get, besides those of the scenario.</summary>
    internal IReadOnlyList<KeyValuePair<string, string>> Parameters { get; init; } = [];

    /// <summary>The program at a path; its file name says whether it is vmm.</summary>
    internal static Peer At(string name, string path) => new(name, path, System.IO.Path.GetFileName(path) == "vmm");
}
