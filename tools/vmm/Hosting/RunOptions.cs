using System.Globalization;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Migration.Channels;
using Vmm.Migration.Qmp;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Guests;
using Vmm.Tools.Cli.Registry;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Hosting;

/// <summary>The options of <c>vmm run</c>, checked before the command makes anything.</summary>
internal sealed record RunOptions
{
    public required VmOptions Vm { get; init; }

    /// <summary>Address at which to wait for a migration, or null.</summary>
    public MigrationAddress? Incoming { get; init; }

    /// <summary>Address at which to receive descriptors before the VM is made, or null.</summary>
    public MigrationAddress? Cpr { get; init; }

    /// <summary>True if there is a workload, which needs no accelerator: <c>--accel auto</c> then works without KVM.</summary>
    public bool HasWorkload { get; init; }

    /// <summary>The pid of the process whose VM, name and socket this process takes over, or null.</summary>
    public int? Replaces { get; init; }

    /// <summary>Absolute path of the QMP socket, or null for the default in the VM directory.</summary>
    public string? QmpPath { get; init; }

    public string? SnapshotDirectory { get; init; }

    /// <summary>The texts of the options on the command line.</summary>
    internal sealed record Texts
    {
        public string? Name { get; init; }
        public string Machine { get; init; } = "none";
        public string Accel { get; init; } = "auto";
        public string? Kernel { get; init; }
        public string? Initrd { get; init; }
        public string Append { get; init; } = "";
        public int Cpus { get; init; } = 1;
        public string? Uuid { get; init; }
        public IReadOnlyList<string> Memory { get; init; } = [];
        public IReadOnlyList<string> Workload { get; init; } = [];
        public IReadOnlyList<string> Device { get; init; } = [];
        public string? Incoming { get; init; }
        public string? Cpr { get; init; }
        public int? Replaces { get; init; }
        public bool Paused { get; init; }
        public bool OnlyMigratable { get; init; }
        public string? Qmp { get; init; }
        public string? SnapshotDir { get; init; }
    }

    /// <summary>Checks the texts.</summary>
    /// <exception cref="CliException">Exit code usage; the message names the option.</exception>
    public static RunOptions Parse(Texts texts)
    {
        if (texts.Name is { } name) VmDirectory.CheckName(name);
        if (texts.Machine != "none") throw CliException.Usage($"--machine '{texts.Machine}': not known; known: none");
        (string accelerator, int dirtyRingEntries) = Accelerator(texts.Accel);
        Guid uuid = Guid.Empty;
        if (texts.Uuid is { } u && !Guid.TryParseExact(u, "D", out uuid))
            throw CliException.Usage($"--uuid '{u}': expected 12345678-1234-1234-1234-123456789abc");
        try
        {
            bool waits = texts.Incoming is not null;
            IReadOnlyList<RamBlockOptions> memory = MemoryOption.Parse(texts.Memory);
            return new RunOptions
            {
                Vm = new VmOptions
                {
                    Name = texts.Name,
                    Uuid = uuid,
                    Memory = memory,
                    Accelerator = accelerator,
                    DirtyRingEntries = dirtyRingEntries,
                    Cpus = texts.Cpus,
                    Kernel = Kernel(texts, memory),
                    Devices = [.. texts.Device.Select(DeviceOptions.Parse), .. texts.Workload.Select(Workload)],
                    IsIncoming = waits,
                    AutoStart = !texts.Paused,
                    OnlyMigratable = texts.OnlyMigratable,
                },
                HasWorkload = texts.Workload.Count > 0,
                Incoming = Channel(texts.Incoming),
                Cpr = Channel(texts.Cpr),
                Replaces = texts.Replaces,
                QmpPath = texts.Qmp is null ? null : VmTarget.SocketPath(texts.Qmp),
                SnapshotDirectory = texts.SnapshotDir is null ? null
                    : texts.SnapshotDir.Length > 0 ? Path.GetFullPath(texts.SnapshotDir) : throw CliException.Usage("--snapshot-dir needs a path"),
            };
        }
        catch (ConfigurationException e)
        {
            throw new CliException(ExitCode.Usage, e.Message, e) { Hint = e.Hint };
        }
    }

    /// <summary>Separates the channel for descriptors from the main channel.</summary>
    public static (string? Main, string? Cpr) SplitIncoming(IReadOnlyList<string> texts)
    {
        string? main = null, cpr = null;
        foreach (string text in texts)
        {
            bool isCpr = Named("--incoming", text, () => QmpServer.ParseIncoming(text)).IsCpr;
            ref string? place = ref isCpr ? ref cpr : ref main;
            if (place is not null) throw CliException.Usage($"--incoming '{text}': there is another {(isCpr ? "cpr" : "main")} channel");
            place = text;
        }
        if (cpr is not null && main is null) throw CliException.Usage("--incoming with a cpr channel needs a main channel too");
        return (main, cpr);
    }

    private static MigrationAddress? Channel(string? text) =>
        text is null ? null : Named("--incoming", text, () => QmpServer.ParseIncoming(text)).Address?.Rooted();

    /// <summary><c>auto|kvm|none</c>, the first two with <c>,dirty-ring-size=ENTRIES</c> as in QEMU.</summary>
    private static (string Name, int DirtyRingEntries) Accelerator(string text)
    {
        string what = $"--accel '{text}'";
        string[] parts = OptionList.Split(text);
        if (parts[0] is not ("auto" or "kvm" or "none")) throw CliException.Usage($"{what}: not known; known: auto, kvm, none");
        int entries = 0;
        foreach (string part in parts.Skip(1))
        {
            (string key, string value) = OptionList.Pair(part, what);
            if (key != "dirty-ring-size" || parts[0] == "none") throw CliException.Usage($"{what}: '{key}' is not known{(parts[0] == "none" ? "" : "; known: dirty-ring-size")}");
            if (!int.TryParse(value, NumberStyles.None, CultureInfo.InvariantCulture, out entries)) throw CliException.Usage($"{what}: 'dirty-ring-size' must be a number of entries, found '{value}'");
        }
        return (parts[0], entries);
    }

    private static KernelOptions? Kernel(Texts texts, IReadOnlyList<RamBlockOptions> memory)
    {
        if (texts.Kernel is not { } path)
            return texts.Initrd is null && texts.Append.Length == 0 ? null : throw CliException.Usage("--initrd and --append need a --kernel");
        return new KernelOptions
        {
            KernelPath = path, InitrdPath = texts.Initrd, CommandLine = texts.Append,
            // Without the cast null would become an empty memory.
            Image = path.StartsWith(GuestImage.BuiltInPrefix, StringComparison.Ordinal)
                ? (ReadOnlyMemory<byte>?)GuestImage.BuiltIn(path[GuestImage.BuiltInPrefix.Length..], [.. memory.Select(static b => b.SizeBytes)]) : null,
        };
    }

    // A workload is a device. Its rate may have the unit that the help shows, as in rate=100M/s.
    private static DeviceOptions Workload(string text)
    {
        string[] parts = OptionList.Split(text);
        if (parts[0] != "pattern") throw new ConfigurationException($"--workload '{text}': '{parts[0]}' is not known; known: pattern");
        return new DeviceOptions(parts[0], parts.Skip(1).Select(p =>
        {
            KeyValuePair<string, string> pair = OptionList.Pair(p, $"--workload '{text}'");
            return pair.Key == "rate" && pair.Value.EndsWith("/s", StringComparison.Ordinal) ? new(pair.Key, pair.Value[..^2]) : pair;
        }));
    }

    private static T Named<T>(string option, string value, Func<T> parse)
    {
        try
        {
            return parse();
        }
        catch (ConfigurationException e)
        {
            throw new CliException(ExitCode.Usage, $"{option} '{value}': {e.Message}", e) { Hint = e.Hint };
        }
    }
}
