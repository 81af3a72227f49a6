using System.Globalization;
using System.Text.Json.Nodes;
using Vmm.Core.Errors;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Qmp;

/// <summary>Converts QMP's MigrationAddress (qmp 8.2), which fits its declaration.</summary>
internal static class QmpAddress
{
    internal static MigrationAddress Parse(JsonObject value)
    {
        string transport = value["transport"]!.GetValue<string>();
        return transport switch
        {
            "socket" => Socket(value),
            "exec" => new() { Transport = MigrationTransport.Exec, Arguments = Exec((JsonArray)value["args"]!) },
            "file" => new() { Transport = MigrationTransport.File, Path = Text(value, "filename"), OffsetBytes = Offset(value["offset"]!) },
            _ => throw NotImplemented($"transport '{transport}'"),
        };
    }

    private static MigrationAddress Socket(JsonObject value)
    {
        string type = value["type"]!.GetValue<string>();
        switch (type)
        {
            case "inet":
                Refuse(value, "mptcp", "keep-alive-count", "keep-alive-idle", "keep-alive-interval");
                return new()
                {
                    Transport = MigrationTransport.Tcp, Host = value["host"]!.GetValue<string>(), Port = Port(value), ToPort = value["to"]?.GetValue<int>(),
                    IPv4 = value["ipv4"]?.GetValue<bool>(), IPv6 = value["ipv6"]?.GetValue<bool>(), KeepAlive = value["keep-alive"]?.GetValue<bool>() ?? false,
                };
            case "unix":
                Refuse(value, "abstract");
                return new() { Transport = MigrationTransport.Unix, Path = Text(value, "path") };
            case "fd":
                return new() { Transport = MigrationTransport.Fd, Path = Text(value, "str") };
            default:
                throw NotImplemented($"socket type '{type}'");
        }
    }

    private static int Port(JsonObject value)
    {
        string text = value["port"]!.GetValue<string>();
        return int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int port) && port <= 65535
            ? port
            : throw new QmpErrorException($"Parameter 'port' expects a number from 0 to 65535, found '{text}'");
    }

    private static string[] Exec(JsonArray args)
    {
        if (args.Count == 0) throw new QmpErrorException("Parameter 'args' expects at least one element");
        return [.. args.Select(static a => a!.GetValue<string>())];
    }

    private static long Offset(JsonNode value)
    {
        ulong offset = value.GetValue<ulong>();
        return offset <= long.MaxValue ? (long)offset : throw new QmpErrorException($"Parameter 'offset' expects at most {long.MaxValue}");
    }

    private static string Text(JsonObject value, string name) =>
        value[name]!.GetValue<string>() is { Length: > 0 } text ? text : throw new QmpErrorException($"Parameter '{name}' expects a non-empty string");

    private static void Refuse(JsonObject value, params ReadOnlySpan<string> names)
    {
        foreach (string name in names)
            if (value[name] is { } found && !(found is JsonValue v && v.TryGetValue(out bool on) && !on)) throw NotImplemented($"'{name}'");
    }

    private static QmpErrorException NotImplemented(string what) => new($"migration address: {what} is not implemented in this version of vmm");
}
