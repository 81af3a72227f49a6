namespace Vmm.Tools.Bench.Migrate;

/// <summary>What the source's RAM holds.</summary>
internal enum RamContent
{
    /// <summary>Bytes that do not compress.</summary>
    Random,
    /// <summary>Zeros.</summary>
    Zero,
    /// <summary>Half of the pages zero, the others random: in runs of 256 pages in the lower half of RAM, every other page in the upper half.</summary>
    HalfZero,
    /// <summary>Every page half random and half text.</summary>
    HalfCompressible,
}

/// <summary>What a scenario must show; each member that is set must hold.</summary>
internal sealed record Target
{
    /// <summary>The peer's median total time over ours, at least.</summary>
    internal double? Ratio { get; init; }
    /// <summary>Our CPU seconds per GiB over the peer's, both ends, at most.</summary>
    internal double? CpuRatio { get; init; }
    /// <summary>Our throughput in percent of the loopback's with as many streams, at least.</summary>
    internal double? LoopbackPercent { get; init; }
    /// <summary>Our median downtime, at most.</summary>
    internal double? MedianDowntimeMs { get; init; }
    /// <summary>Our longest downtime, at most.</summary>
    internal double? LongestDowntimeMs { get; init; }
    /// <summary>Our median downtime over the peer's, at most.</summary>
    internal double? DowntimeRatio { get; init; }
}

/// <summary>One kind of migration that is measured in pairs. The VM runs in each of them.</summary>
internal sealed record Scenario
{
    /// <summary>Name on the command line.</summary>
    internal required string Name { get; init; }
    /// <summary>Another name on the command line, of all scenarios that have it.</summary>
    internal required string Group { get; init; }
    /// <summary>One line for the help.</summary>
    internal required string Summary { get; init; }
    /// <summary>What RAM holds.</summary>
    internal RamContent Content { get; init; }
    /// <summary>RAM in MiB; 0 takes that of the command line.</summary>
    internal int SizeMiB { get; init; }
    /// <summary>Number of multifd channels; 0 is a migration without multifd.</summary>
    internal int Channels { get; init; }
    /// <summary>The parameter <c>multifd-compression</c>, at level 1.</summary>
    internal string Compression { get; init; } = "none";
    /// <summary>Rate at which the guest writes to random pages, in 10^6 bytes a second; 0 is a guest that writes nothing.</summary>
    internal int WriterMBps { get; init; }
    /// <summary>The parameter <c>max-bandwidth</c>, in 10^6 bytes a second; 0 is no limit.</summary>
    internal int MaxBandwidthMBps { get; init; }
    /// <summary>The parameter <c>downtime-limit</c>; QEMU's default.</summary>
    internal int DowntimeLimitMs { get; init; } = 300;
    /// <summary>A migration that has not switched over by then is cancelled: it does not converge.</summary>
    internal int DeadlineSeconds { get; init; } = 120;
    /// <summary>Number of small devices, each with a section of its own.</summary>
    internal int Devices { get; init; }
    /// <summary>True where the peer has no counterpart.</summary>
    internal bool IsVmmOnly { get; init; }
    /// <summary>What it must show.</summary>
    internal Target Target { get; init; } = new();

    /// <summary>Size of RAM in MiB.</summary>
    internal int RamMiB(int commandLineMiB) => SizeMiB > 0 ? SizeMiB : commandLineMiB;

    /// <summary>Number of data connections, for the comparison with a plain copy.</summary>
    internal int Streams => Math.Max(1, Channels);
}

/// <summary>All scenarios.</summary>
internal static class Scenarios
{
    /// <summary>Bandwidth limit of the scenarios <c>converge</c>.</summary>
    internal const int ConvergeMBps = 400;

    /// <summary>Dirty rates of the scenarios <c>converge</c>.</summary>
    internal static readonly IReadOnlyList<int> ConvergeRates = [100, 200, 300, 360, 450, 540];

    /// <summary>RAM of the scenarios <c>scale</c>.</summary>
    internal static readonly IReadOnlyList<int> ScaleGiB = [1, 2, 4, 8];

    /// <summary>A dirty rate that no guest reaches.</summary>
    private const int UnlimitedMBps = 1_000_000;

    private static readonly Target s_multifd = new() { Ratio = 1.1, CpuRatio = 1.0, LoopbackPercent = 70 };

    /// <summary>The table.</summary>
    internal static IReadOnlyList<Scenario> All { get; } =
    [
        new() { Name = "one", Group = "throughput", Summary = "random RAM, one channel, return path", Target = new() { Ratio = 1.4, CpuRatio = 0.8 } },
        new() { Name = "multifd2", Group = "throughput", Summary = "random RAM, 2 multifd channels", Channels = 2, Target = s_multifd },
        new() { Name = "multifd4", Group = "throughput", Summary = "random RAM, 4 multifd channels", Channels = 4, Target = s_multifd },
        new() { Name = "multifd8", Group = "throughput", Summary = "random RAM, 8 multifd channels", Channels = 8 },
        new() { Name = "zero", Group = "throughput", Summary = "RAM that is all zero, one channel", Content = RamContent.Zero, Target = new() { Ratio = 1.5 } },
        new() { Name = "half", Group = "throughput", Summary = "half of the pages zero, in runs and interleaved, one channel", Content = RamContent.HalfZero, Target = new() { Ratio = 1.3 } },
        new()
        {
            Name = "zstd", Group = "throughput", Summary = "half-compressible RAM, 2 multifd channels, zstd at level 1", Content = RamContent.HalfCompressible,
            Channels = 2, Compression = "zstd", Target = new() { Ratio = 1.0 },
        },
        new() { Name = "zero-multifd2", Group = "multifd-zero", Summary = "RAM that is all zero, 2 multifd channels", Content = RamContent.Zero, Channels = 2 },
        new() { Name = "half-multifd2", Group = "multifd-zero", Summary = "half of the pages zero, 2 multifd channels", Content = RamContent.HalfZero, Channels = 2 },
        new()
        {
            Name = "idle", Group = "downtime", Summary = "downtime of a guest with random RAM that writes nothing; use --pairs 20",
            Target = new() { MedianDowntimeMs = 5, LongestDowntimeMs = 10 },
        },
        new()
        {
            Name = "busy100", Group = "downtime", Summary = "downtime of a guest with random RAM that writes 100 MB/s", WriterMBps = 100,
            Target = new() { MedianDowntimeMs = 15, DowntimeRatio = 0.2 },
        },
        .. ConvergeRates.Select(static rate => new Scenario
        {
            Name = $"converge-{rate}", Group = "converge", Summary = $"1 GiB, a guest that writes {rate} MB/s, bandwidth limit {ConvergeMBps} MB/s", SizeMiB = 1024,
            WriterMBps = rate, MaxBandwidthMBps = ConvergeMBps, DeadlineSeconds = 60,
        }),
        .. ScaleGiB.Select(static gib => new Scenario { Name = $"scale-{gib}g", Group = "scale", Summary = $"random RAM, one channel, {gib} GiB", SizeMiB = gib * 1024 }),
        .. ((int[])[0, 1000]).Select(static count => new Scenario
        {
            Name = $"devices-{count}", Group = "devices", Summary = $"downtime with {count} small devices; RAM is zero, so that it adds nothing", SizeMiB = 64, Content = RamContent.Zero,
            Devices = count, IsVmmOnly = true,
        }),
        .. ((int[])[0, 10_000]).Select(static count => new Scenario
        {
            // A guest that writes without a pause and a limit that hardly a pass fits in make many rounds.
            Name = $"sections-{count}", Group = "sections", Summary = $"time of a round with {count} sections registered, 64 MiB, a guest that writes all the time", SizeMiB = 64,
            Devices = count, WriterMBps = UnlimitedMBps, DowntimeLimitMs = 0, DeadlineSeconds = 6, IsVmmOnly = true,
        }),
    ];

    /// <summary>The scenarios of these names of scenarios and groups; without any, the groups throughput and downtime.</summary>
    /// <exception cref="ArgumentException">A name is not known.</exception>
    internal static IReadOnlyList<Scenario> Named(IReadOnlyList<string> names)
    {
        if (names.Count == 0) names = ["throughput", "downtime"];
        var found = new List<Scenario>();
        foreach (string name in names)
        {
            Scenario[] matches = [.. All.Where(s => name == "all" || s.Name == name || s.Group == name)];
            if (matches.Length == 0) throw new ArgumentException($"no scenario or group '{name}'; known: {string.Join(", ", All.Select(static s => s.Group).Concat(All.Select(static s => s.Name)).Distinct())}");
            found.AddRange(matches.Except(found));
        }
        return found;
    }
}
