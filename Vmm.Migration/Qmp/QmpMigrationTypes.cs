using Vmm.Migration.Parameters;
using Vmm.Migration.Status;


namespace Vmm.Migration.Qmp;

/// <summary>QAPI types of the migration commands (qmp 8.2 to 8.7), declared once for checking and for the schema.</summary>
internal static class QmpMigrationTypes
{
    // Stands first, because later initializers use it.
    private static readonly QmpAlternate s_strOrNull = new("StrOrNull", QmpType.Str, QmpType.Null);

    private static readonly QmpEnum s_socketType = new("inet", "unix", "vsock", "fd");

    private static readonly Dictionary<string, QmpObject> s_socketVariants = new()
    {
        ["inet"] = new(new("host", QmpType.Str), new("port", QmpType.Str), new("numeric", QmpType.Bool, true), new("to", QmpType.UInt16, true),
            new("ipv4", QmpType.Bool, true), new("ipv6", QmpType.Bool, true), new("keep-alive", QmpType.Bool, true),
            new("keep-alive-count", QmpType.UInt32, true), new("keep-alive-idle", QmpType.UInt32, true),
            new("keep-alive-interval", QmpType.UInt32, true), new("mptcp", QmpType.Bool, true)),
        ["unix"] = new(new("path", QmpType.Str), new("abstract", QmpType.Bool, true), new("tight", QmpType.Bool, true)),
        ["vsock"] = new(new("cid", QmpType.Str), new("port", QmpType.Str)),
        ["fd"] = new(new QmpMember("str", QmpType.Str)),
    };

    private static readonly QmpObject s_socketAddress = new(new QmpMember("type", s_socketType)) { Tag = "type", Variants = s_socketVariants };

    internal static readonly QmpObject Address = new(new QmpMember("transport", new QmpEnum("socket", "exec", "rdma", "file")))
    {
        Tag = "transport",
        Variants = new Dictionary<string, QmpObject>
        {
            ["socket"] = s_socketAddress,
            ["exec"] = new(new QmpMember("args", new QmpArray(QmpType.Str))),
            ["rdma"] = new(new("host", QmpType.Str), new("port", QmpType.Str)),
            ["file"] = new(new("filename", QmpType.Str), new("offset", QmpType.UInt64)),
        },
    };

    internal static readonly QmpArray Channels = new(new QmpObject(new("channel-type", new QmpEnum("main", "cpr")), new("addr", Address)));

    internal static readonly QmpArray CapabilityStatus =
        new(new QmpObject(new("capability", new QmpEnum([.. MigrationCapabilityNames.All])), new("state", QmpType.Bool)));

    /// <summary>All parameters, each optional, because a client may set any subset. QEMU declares the answer of the query with this type too.</summary>
    internal static readonly QmpObject Parameters = new([.. MigrationParameterTable.All.Select(static p => new QmpMember(p.Name, TypeOf(p), Optional: true))]);

    private static readonly QmpObject s_ram = new(
        new("transferred", QmpType.Int), new("remaining", QmpType.Int), new("total", QmpType.Int), new("duplicate", QmpType.Int),
        new("normal", QmpType.Int), new("normal-bytes", QmpType.Int), new("dirty-pages-rate", QmpType.Int), new("mbps", QmpType.Number),
        new("dirty-sync-count", QmpType.Int), new("postcopy-requests", QmpType.Int), new("page-size", QmpType.Int), new("multifd-bytes", QmpType.UInt64),
        new("pages-per-second", QmpType.UInt64), new("precopy-bytes", QmpType.UInt64), new("downtime-bytes", QmpType.UInt64),
        new("postcopy-bytes", QmpType.UInt64), new("dirty-sync-missed-zero-copy", QmpType.UInt64));

    private static readonly QmpObject s_downtime = new(
        new("drain-ms", QmpType.Number), new("device-stop-ms", QmpType.Number), new("final-ram-ms", QmpType.Number), new("device-state-ms", QmpType.Number),
        new("send-ms", QmpType.Number), new("load-ms", QmpType.Number), new("start-ms", QmpType.Number), new("total-ms", QmpType.Number),
        new("guest-at-ns", QmpType.Int, true));

    private static readonly QmpObject s_switchover = new(new("waits-for", new QmpEnum([.. SwitchoverWaitNames.All])), new("predicted-downtime-ms", QmpType.Number, true));

    private static readonly QmpObject s_error = new(
        new("side", QmpType.Str), new("phase", QmpType.Str), new("message", QmpType.Str), new("section", QmpType.Str, true), new("offset", QmpType.Int, true),
        new("expected", QmpType.Str, true), new("found", QmpType.Str, true), new("hint", QmpType.Str, true));

    internal static readonly QmpObject MigrationInfo = new(
        new("status", QmpEvents.MigrationStatus, true), new("ram", s_ram, true), new("total-time", QmpType.Int, true),
        new("expected-downtime", QmpType.Int, true), new("downtime", QmpType.Int, true), new("setup-time", QmpType.Int, true),
        new("remaining", QmpType.UInt64, true), new("cpu-throttle-percentage", QmpType.Int, true), new("error-desc", QmpType.Str, true), new("blocked-reasons", new QmpArray(QmpType.Str), true),
        new("socket-address", new QmpArray(s_socketAddress), true), new(QmpServer.ExtensionPrefix + "downtime", s_downtime, true),
        new(QmpServer.ExtensionPrefix + "error", s_error, true), new(QmpServer.ExtensionPrefix + "switchover", s_switchover, true));

    private static QmpType TypeOf(MigrationParameter parameter) => parameter.Kind switch
    {
        MigrationParameterKind.UInt8 => QmpType.UInt8,
        MigrationParameterKind.UInt32 => QmpType.UInt32,
        MigrationParameterKind.Bool => QmpType.Bool,
        MigrationParameterKind.Enum => new QmpEnum([.. parameter.Values]),
        MigrationParameterKind.StringOrNull => s_strOrNull,
        MigrationParameterKind.StringList => new QmpArray(QmpType.Str),
        _ => QmpType.UInt64,
    };
}
