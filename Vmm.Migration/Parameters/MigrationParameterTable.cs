using System.Globalization;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Parameters;

/// <summary>What kind of value a parameter takes.</summary>
internal enum MigrationParameterKind
{
    /// <summary>An unsigned 64-bit number.</summary>
    UInt64,
    /// <summary>An unsigned 64-bit number of bytes, or of bytes a second.</summary>
    Size,
    /// <summary>An unsigned 32-bit number.</summary>
    UInt32,
    /// <summary>An unsigned 8-bit number.</summary>
    UInt8,
    /// <summary>True or false.</summary>
    Bool,
    /// <summary>One of <see cref="MigrationParameter.Values"/>.</summary>
    Enum,
    /// <summary>A string; null is the same as the empty one.</summary>
    StringOrNull,
    /// <summary>A list of strings.</summary>
    StringList,
}

/// <summary>
/// One migration parameter as QEMU defines it (qmp 8.6). A value is a <see cref="ulong"/> for every kind of number, a <see cref="bool"/>, a
/// <see cref="string"/> for enums and strings, or an array of strings for lists.
/// </summary>
internal sealed record MigrationParameter
{
    /// <summary>Wire name.</summary>
    public required string Name { get; init; }
    /// <summary>Kind of value.</summary>
    public required MigrationParameterKind Kind { get; init; }
    /// <summary>QEMU's default.</summary>
    public required object Default { get; init; }
    /// <summary>Smallest number.</summary>
    public ulong Min { get; init; }
    /// <summary>Largest number.</summary>
    public ulong Max { get; init; } = ulong.MaxValue;
    /// <summary>The end of QEMU's range error, after <c>Option NAME expects</c>; null if the range itself gives the text.</summary>
    public string? RangeText { get; init; }
    /// <summary>QEMU's whole range error if it has another form, or null.</summary>
    public string? RangeError { get; init; }
    /// <summary>All values of an enum; empty for other kinds.</summary>
    public IReadOnlyList<string> Values { get; init; } = [];
    /// <summary>Unit for display: <c>ms</c>, <c>bytes/second</c>, ...; empty for none.</summary>
    public string Unit { get; init; } = string.Empty;
    /// <summary>In HMP a bare number means MiB (QEMU: <c>migrate_set_parameter max-bandwidth</c>).</summary>
    public bool IsMiBInHmp { get; init; }
    /// <summary>True if QEMU marks the parameter unstable.</summary>
    public bool IsUnstable { get; init; }

    /// <summary>Reads the value in a set; null when vmm does not implement the parameter, which then always has its default.</summary>
    internal Func<MigrationParameters, object>? Read { get; init; }
    /// <summary>Makes a set with another value.</summary>
    internal Func<MigrationParameters, object, MigrationParameters>? Write { get; init; }
    /// <summary>Enum values that vmm implements; null means all of them.</summary>
    internal IReadOnlyList<string>? HonouredValues { get; init; }
    /// <summary>A further condition on a number, e.g. a power of two.</summary>
    internal Func<ulong, bool> IsValid { get; init; } = static _ => true;

    /// <summary>The value of this parameter in a set.</summary>
    public object Get(MigrationParameters parameters) => Read?.Invoke(parameters) ?? Default;

    /// <summary>A set with another value of this parameter.</summary>
    /// <param name="parameters">The set to change.</param>
    /// <param name="value">The value, of the type that the kind wants.</param>
    /// <returns>The new set.</returns>
    /// <exception cref="ConfigurationException">Out of range (QEMU's text) or not implemented (names the parameter).</exception>
    public MigrationParameters With(MigrationParameters parameters, object value)
    {
        ArgumentNullException.ThrowIfNull(value);
        if (value is ulong n && (n < Min || n > Max || !IsValid(n)))
            throw new ConfigurationException(RangeError ?? $"Option {Name} expects {RangeText ?? $"a value between {Min} and {Max}"}");
        if (value is string s && Values.Count > 0 && !Values.Contains(s))
            throw new ConfigurationException($"Parameter '{Name}' does not accept value '{s}'");
        if (Write is not null && (HonouredValues is null || HonouredValues.Contains((string)value))) return Write(parameters, value);
        if (Write is not null)
        {
            throw new ConfigurationException($"value '{value}' of parameter '{Name}' is not implemented in this version of vmm")
            {
                Hint = $"implemented: {string.Join(", ", HonouredValues!)}",
            };
        }
        bool isDefault = value is string[] list ? list.SequenceEqual((string[])Default) : value.Equals(Default);
        if (isDefault) return parameters;
        throw new ConfigurationException($"parameter '{Name}' is not implemented in this version of vmm")
        {
            Hint = $"only its default is accepted: {Format(Default)}",
        };
    }

    /// <summary>A value as text: numbers in decimal, switches as on and off, strings as they are.</summary>
    public static string Format(object value) => value switch
    {
        bool b => b ? "on" : "off",
        string[] list => string.Join(' ', list),
        string { Length: 0 } => "''",
        _ => Convert.ToString(value, CultureInfo.InvariantCulture)!,
    };
}

/// <summary>All migration parameters: those of QEMU 11.1 in the order in which it shows them, then vmm's own.</summary>
internal static class MigrationParameterTable
{
    private static readonly string[] s_modes = ["normal", "cpr-reboot", "cpr-transfer", "cpr-exec"];
    private static readonly string[] s_detection = ["none", "legacy", "multifd"];

    /// <summary>The value of <c>x-precopy-deadline-action</c> that stops the guest.</summary>
    internal const string ForceAction = "force";

    /// <summary>The range of <c>max-cpu-throttle</c>, which depends on another parameter; <see cref="MigrationParameterSet.Replace"/> compares the two.</summary>
    internal const string MaxCpuThrottleRange = "an integer in the range of cpu-throttle-initial to 99";

    /// <summary>Every parameter but QEMU's <c>block-bitmap-mapping</c>, because vmm has no block devices.</summary>
    public static IReadOnlyList<MigrationParameter> All { get; } =
    [
        Number("announce-initial", 50, 0, 100_000, "ms"),
        Number("announce-max", 550, 0, 100_000, "ms"),
        Number("announce-rounds", 5, 0, 1000, ""),
        Number("announce-step", 100, 1, 10_000, "ms") with { RangeText = "a value between 0 and 10000" },
        UInt8("throttle-trigger-threshold", 50, 1, 100) with
        {
            Read = static p => p.ThrottleTriggerThresholdPercent, Write = static (p, v) => p with { ThrottleTriggerThresholdPercent = (ulong)v },
        },
        UInt8("cpu-throttle-initial", 20, 1, 99) with
        {
            Read = static p => p.CpuThrottleInitialPercent, Write = static (p, v) => p with { CpuThrottleInitialPercent = (ulong)v },
        },
        UInt8("cpu-throttle-increment", 10, 1, 99) with
        {
            Read = static p => p.CpuThrottleIncrementPercent, Write = static (p, v) => p with { CpuThrottleIncrementPercent = (ulong)v },
        },
        Switch("cpu-throttle-tailslow") with
        {
            Read = static p => p.HasCpuThrottleTailslow, Write = static (p, v) => p with { HasCpuThrottleTailslow = (bool)v },
        },
        UInt8("max-cpu-throttle", 99, 1, 99) with
        {
            RangeText = MaxCpuThrottleRange,
            Read = static p => p.MaxCpuThrottlePercent, Write = static (p, v) => p with { MaxCpuThrottlePercent = (ulong)v },
        },
        Text("tls-creds"),
        Text("tls-hostname"),
        Text("tls-authz"),
        Number("max-bandwidth", 128 << 20, 0, ulong.MaxValue, "bytes/second") with
        {
            Kind = MigrationParameterKind.Size, IsMiBInHmp = true,
            Read = static p => p.MaxBandwidthBytesPerSecond, Write = static (p, v) => p with { MaxBandwidthBytesPerSecond = (ulong)v },
        },
        Number("avail-switchover-bandwidth", 0, 0, ulong.MaxValue, "bytes/second") with
        {
            Kind = MigrationParameterKind.Size, IsMiBInHmp = true,
            Read = static p => p.AvailSwitchoverBandwidthBytesPerSecond, Write = static (p, v) => p with { AvailSwitchoverBandwidthBytesPerSecond = (ulong)v },
        },
        Number("max-postcopy-bandwidth", 0, 0, ulong.MaxValue, "bytes/second") with { Kind = MigrationParameterKind.Size },
        Number("downtime-limit", 300, 0, MigrationParameterSet.MaxDowntimeLimitMs, "ms") with
        {
            RangeText = "an integer in the range of 0 to (2000 * 1000) ms",
            Read = static p => p.DowntimeLimitMs, Write = static (p, v) => p with { DowntimeLimitMs = (ulong)v },
        },
        Number("x-checkpoint-delay", 20_000, 0, uint.MaxValue, "ms") with { Kind = MigrationParameterKind.UInt32, IsUnstable = true },
        UInt8("multifd-channels", 2, 1, 255) with { Unit = "", Read = static p => (ulong)p.MultifdChannels, Write = static (p, v) => p with { MultifdChannels = (int)(ulong)v } },
        Choice("multifd-compression", "none", ["none", "zlib", "zstd"]) with
        {
            Read = static p => p.MultifdCompression, Write = static (p, v) => Compressed(p, (string)v),
        },
        UInt8("multifd-zlib-level", 1, 0, 9) with { Unit = "", Read = static p => (ulong)p.MultifdZlibLevel, Write = static (p, v) => p with { MultifdZlibLevel = (int)(ulong)v } },
        UInt8("multifd-qatzip-level", 1, 1, 9) with { Unit = "" },
        UInt8("multifd-zstd-level", 1, 0, 20) with { Unit = "", Read = static p => (ulong)p.MultifdZstdLevel, Write = static (p, v) => p with { MultifdZstdLevel = (int)(ulong)v } },
        Choice("zero-page-detection", "multifd", s_detection) with
        {
            Read = static p => s_detection[(int)p.ZeroPageDetection],
            Write = static (p, v) => p with { ZeroPageDetection = (ZeroPageDetection)Array.IndexOf(s_detection, (string)v) },
        },
        Number("xbzrle-cache-size", 64 << 20, 4096, ulong.MaxValue, "bytes") with
        {
            Kind = MigrationParameterKind.Size, IsValid = ulong.IsPow2, RangeText = "a power of two no less than the target page size",
            Read = static p => p.XbzrleCacheSizeBytes, Write = static (p, v) => p with { XbzrleCacheSizeBytes = (ulong)v },
        },
        Number("x-vcpu-dirty-limit-period", 1000, 1, 1000, "ms") with { IsUnstable = true },
        Number("vcpu-dirty-limit", 1, 1, ulong.MaxValue, "MB/s") with { RangeError = "Parameter 'vcpu-dirty-limit' must be greater than 1 MB/s" },
        Choice("mode", "normal", s_modes) with
        {
            Read = static p => s_modes[(int)p.Mode], Write = static (p, v) => p with { Mode = (MigrationMode)Array.IndexOf(s_modes, (string)v) },
        },
        Switch("direct-io"),
        Number("x-rdma-chunk-size", 1 << 20, 1 << 20, 1 << 30, "bytes") with
        {
            Kind = MigrationParameterKind.Size, IsUnstable = true, IsValid = ulong.IsPow2,
            RangeError = "Option x_rdma_chunk_size expects a power of 2 in the range 1MiB to 1024MiB",
        },
        new()
        {
            Name = "cpr-exec-command", Kind = MigrationParameterKind.StringList, Default = Array.Empty<string>(),
            Read = static p => p.CprExecCommand.ToArray(), Write = static (p, v) => p with { CprExecCommand = (string[])v },
        },
        // vmm's own. In QEMU this is a property of the migration object.
        Switch("x-multifd-flush-after-each-section") with
        {
            IsUnstable = true, Read = static p => p.MultifdFlushAfterEachSection, Write = static (p, v) => p with { MultifdFlushAfterEachSection = (bool)v },
        },
        // vmm's own: when the VM stops.
        Switch("x-downtime-floor") with
        {
            Default = true, IsUnstable = true, Read = static p => p.HasDowntimeFloor, Write = static (p, v) => p with { HasDowntimeFloor = (bool)v },
        },
        Number("x-downtime-limit-max", 0, 0, MigrationParameterSet.MaxDowntimeLimitMs, "ms") with
        {
            IsUnstable = true, Read = static p => p.MaxDowntimeLimitMs, Write = static (p, v) => p with { MaxDowntimeLimitMs = (ulong)v },
        },
        Number("x-precopy-deadline", 0, 0, 7 * 24 * 3_600_000, "ms") with
        {
            IsUnstable = true, Read = static p => p.PrecopyDeadlineMs, Write = static (p, v) => p with { PrecopyDeadlineMs = (ulong)v },
        },
        Choice("x-precopy-deadline-action", "cancel", ["cancel", ForceAction, "postcopy"]) with
        {
            IsUnstable = true, HonouredValues = ["cancel", ForceAction],
            Read = static p => p.PrecopyDeadlineAction, Write = static (p, v) => p with { PrecopyDeadlineAction = (string)v },
        },
        // vmm's own: the deadline of every wait for the peer (STREAM.md). QEMU has none.
        Deadline("x-setup-timeout", static p => p.SetupTimeoutMs, static (p, ms) => p with { SetupTimeoutMs = ms }),
        Deadline("x-progress-timeout", static p => p.ProgressTimeoutMs, static (p, ms) => p with { ProgressTimeoutMs = ms }),
        Deadline("x-switchover-timeout", static p => p.SwitchoverTimeoutMs, static (p, ms) => p with { SwitchoverTimeoutMs = ms }),
        Deadline("x-confirm-timeout", static p => p.ConfirmTimeoutMs, static (p, ms) => p with { ConfirmTimeoutMs = ms }),
        Deadline("x-final-word-timeout", static p => p.FinalWordTimeoutMs, static (p, ms) => p with { FinalWordTimeoutMs = ms }),
    ];

    /// <summary>Finds a parameter by its wire name; null for an unknown one.</summary>
    public static MigrationParameter? Find(string name) => All.FirstOrDefault(p => p.Name == name);

    private static MigrationParameters Compressed(MigrationParameters parameters, string compression)
    {
        if (compression == "zstd") ZstdStream.ThrowIfMissing();
        return parameters with { MultifdCompression = compression };
    }

    private static MigrationParameter Number(string name, ulong value, ulong min, ulong max, string unit) => new()
    {
        Name = name, Kind = MigrationParameterKind.UInt64, Default = value, Min = min, Max = max, Unit = unit,
    };

    private static MigrationParameter Deadline(string name, Func<MigrationParameters, ulong> read, Func<MigrationParameters, ulong, MigrationParameters> write) =>
        Number(name, read(new MigrationParameters()), 100, 3_600_000, "ms") with { IsUnstable = true, Read = p => read(p), Write = (p, v) => write(p, (ulong)v) };

    private static MigrationParameter UInt8(string name, ulong value, ulong min, ulong max) => new()
    {
        Name = name, Kind = MigrationParameterKind.UInt8, Default = value, Min = min, Max = max,
        RangeText = max is 99 or 100 ? $"an integer in the range of {min} to {max}" : null,
    };

    private static MigrationParameter Switch(string name) => new() { Name = name, Kind = MigrationParameterKind.Bool, Default = false };

    private static MigrationParameter Text(string name) => new() { Name = name, Kind = MigrationParameterKind.StringOrNull, Default = string.Empty };

    private static MigrationParameter Choice(string name, string value, string[] values) =>
        new() { Name = name, Kind = MigrationParameterKind.Enum, Default = value, Values = values };
}
