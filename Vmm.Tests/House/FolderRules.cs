namespace Vmm.Tests.House;

/// <summary>The folders of one assembly in rows, bottom to top: a folder may use only folders of the rows before its own.</summary>
/// <param name="Name">Name of the project's box in docs/architecture.md: its path from the root.</param>
/// <param name="AssemblyFile">File of the built assembly.</param>
/// <param name="RootNamespace">Namespace of the project's top folder, which the rows call ".".</param>
/// <param name="Rows">Rows of folders, sub-folders with a dot.</param>
internal sealed record FolderRules(string Name, string AssemblyFile, string RootNamespace, string[][] Rows)
{
    /// <summary>The four assemblies that docs/architecture.md draws.</summary>
    public static IReadOnlyList<FolderRules> All { get; } =
    [
        new("Vmm.Core", "Vmm.Core.dll", "Vmm.Core",
        [
            // The top folder of Core is the lowest row, because it holds Registration, which many folders return.
            [".", "Errors", "Diagnostics"],
            ["Interop", "RunStates"],
            ["Buffers", "Threading"],
            ["Channels", "Memory"],
            ["Wire"],
            ["SaveVm"],
            ["VmStates", "Cpr"],
            ["Pci"],
            ["Devices"],
            ["Kvm", "Workloads"],
        ]),
        new("Vmm.Migration", "Vmm.Migration.dll", "Vmm.Migration",
        [
            ["Diagnostics", "Parameters", "Channels", "Ram"],
            ["Status", "Multifd", "Cpr"],
            ["Stream"],
            ["Attempts", "Viewer"],
            ["Outgoing", "Incoming", "Snapshot", "Rehearsals"],
            ["Engine"],
            ["Update"],
            ["Qmp"],
            ["."],
        ]),
        new("Vmm.Devices.Vfio", "Vmm.Devices.Vfio.dll", "Vmm.Devices.Vfio",
        [
            ["Abstractions", "Uapi"],
            ["Kernel", "Migration", "User.Wire"],
            ["User.Client", "User.Backend"],
            ["Device", "User.Server", "Probe"],
            ["Hosted"],
            ["."],
        ]),
        new("tools/vmm", "vmm.dll", "Vmm.Tools.Cli",
        [
            ["Shell", "Guests"],
            ["Registry", "Streams", "Vfio"],
            ["Client"],
            ["Migrate", "Snapshots", "Hosting"],
            ["Devices", "Demo"],
            ["."],
        ]),
    ];

    /// <summary>Describes each arrow that does not point to a lower row and each folder that is in no row. Empty for a good assembly.</summary>
    public IReadOnlyList<string> Broken(IEnumerable<FolderArrow> arrows)
    {
        var row = Rows.SelectMany(static (folders, i) => folders.Select(folder => (folder, i))).ToDictionary(static x => x.folder, static x => x.i);
        var bad = new List<string>();
        foreach (IGrouping<(string From, string To), FolderArrow> arrow in arrows.GroupBy(static a => (a.From, a.To)))
        {
            (string from, string to) = arrow.Key;
            if (row.TryGetValue(from, out int own) && row.TryGetValue(to, out int other) && other < own) continue;
            IEnumerable<string> uses = arrow.Select(static a => $"{a.User} uses {a.Used}").Distinct();
            bad.Add($"{Name}: {from} may not use {to}: {string.Join("; ", uses.Take(5))}");
        }
        return bad;
    }
}
