using System.Text.Json.Nodes;
using Vmm.Core.Errors;

namespace Vmm.Migration.Qmp;

/// <summary>All commands of a server by name, and the commands that describe them (qmp 2 and 6). Immutable after construction.</summary>
internal sealed class QmpCommandTable
{
    internal const string Negotiate = "qmp_capabilities";

    private static readonly QmpObject s_version = new(
        new("qemu", new QmpObject(new("major", QmpType.Int), new("minor", QmpType.Int), new("micro", QmpType.Int))), new("package", QmpType.Str));

    private readonly Dictionary<string, QmpCommand> _commands = [];
    private readonly IReadOnlyList<QmpEventType> _events;
    private readonly Lazy<JsonArray> _schema;

    internal QmpCommandTable(IEnumerable<QmpCommand> commands, IReadOnlyList<QmpEventType> events)
    {
        _events = events;
        _schema = new Lazy<JsonArray>(() => QmpSchema.Build(_commands.Values, _events));
        foreach (QmpCommand command in (IEnumerable<QmpCommand>)[.. Own(), .. commands]) _commands.Add(command.Name, command);
    }

    /// <summary>Every command, including the hidden ones.</summary>
    internal IReadOnlyCollection<QmpCommand> All => _commands.Values;

    internal QmpCommand? Find(string name) => _commands.GetValueOrDefault(name);

    private IEnumerable<QmpCommand> Own()
    {
        yield return new(Negotiate, new(new QmpMember("enable", new QmpArray(new QmpEnum("oob")), true)), QmpObject.Empty, NegotiateCapabilities);
        yield return new("query-version", QmpObject.Empty, s_version, static _ => QmpServer.Version());
        yield return new("query-commands", QmpObject.Empty, new QmpArray(new QmpObject(new QmpMember("name", QmpType.Str))), QueryCommands);
        yield return new("query-qmp-schema", QmpObject.Empty, new QmpArray(SchemaInfo()), _ => _schema.Value.DeepClone());
    }

    private static JsonNode? NegotiateCapabilities(QmpCall call)
    {
        if (call.Session.IsNegotiated)
            throw new QmpErrorException(QmpErrorClass.CommandNotFound, "Capabilities negotiation is already complete, command ignored");
        call.Session.Negotiated(oob: call.Arguments["enable"] is JsonArray { Count: > 0 });
        return null;
    }

    private JsonArray QueryCommands(QmpCall call) =>
        [.. _commands.Values.Where(static c => !c.Hidden).Select(static c => new JsonObject { ["name"] = c.Name })];

    private static QmpObject SchemaInfo()
    {
        var features = new QmpMember("features", new QmpArray(QmpType.Str), true);
        var enumMember = new QmpObject(new("name", QmpType.Str), features);
        var objectMember = new QmpObject(new("name", QmpType.Str), new("type", QmpType.Str), new("default", QmpType.Any, true), features);
        var variant = new QmpObject(new("case", QmpType.Str), new("type", QmpType.Str));
        return new QmpObject(new("name", QmpType.Str), new("meta-type", new QmpEnum("builtin", "enum", "array", "object", "alternate", "command", "event")), features)
        {
            Tag = "meta-type",
            Variants = new Dictionary<string, QmpObject>
            {
                ["builtin"] = new(new QmpMember("json-type", new QmpEnum("string", "number", "int", "boolean", "null", "object", "array", "value"))),
                ["enum"] = new(new("members", new QmpArray(enumMember)), new("values", new QmpArray(QmpType.Str))),
                ["array"] = new(new QmpMember("element-type", QmpType.Str)),
                ["object"] = new(new("members", new QmpArray(objectMember)), new("tag", QmpType.Str, true), new("variants", new QmpArray(variant), true)),
                ["alternate"] = new(new QmpMember("members", new QmpArray(new QmpObject(new QmpMember("type", QmpType.Str))))),
                ["command"] = new(new("arg-type", QmpType.Str), new("ret-type", QmpType.Str), new("allow-oob", QmpType.Bool, true)),
                ["event"] = new(new QmpMember("arg-type", QmpType.Str)),
            },
        };
    }
}
