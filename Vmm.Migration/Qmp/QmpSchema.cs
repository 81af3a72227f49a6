using System.Globalization;
using System.Text.Json.Nodes;

namespace Vmm.Migration.Qmp;

/// <summary>Builds the answer of query-qmp-schema from the declarations (qmp 6; QEMU: <c>qapi-introspect</c>).</summary>
internal static class QmpSchema
{
    internal static JsonArray Build(IEnumerable<QmpCommand> commands, IEnumerable<QmpEventType> events)
    {
        var result = new JsonArray();
        var ids = new Dictionary<QmpType, string>(ReferenceEqualityComparer.Instance);
        var queue = new Queue<QmpType>();
        var done = new HashSet<string>();
        string NameOf(QmpType type)
        {
            if (!ids.TryGetValue(type, out string? name))
            {
                name = type.SchemaName ?? (type is QmpArray array ? $"[{NameOf(array.Element)}]" : ids.Count.ToString(CultureInfo.InvariantCulture));
                ids.Add(type, name);
                queue.Enqueue(type);
            }
            return name;
        }

        NameOf(QmpObject.Empty);
        foreach (QmpCommand command in commands.Where(static c => !c.Hidden))
        {
            var entity = new JsonObject
            {
                ["name"] = command.Name, ["ret-type"] = NameOf(command.Returns), ["meta-type"] = "command", ["arg-type"] = NameOf(command.Arguments),
            };
            if (command.AllowOob) entity["allow-oob"] = true;
            result.Add((JsonNode)entity);
        }
        foreach (QmpEventType one in events)
            result.Add((JsonNode)new JsonObject { ["name"] = one.Name, ["meta-type"] = "event", ["arg-type"] = NameOf(one.Data) });
        while (queue.TryDequeue(out QmpType? type))
        {
            // All integer widths share the name "int", and so do their lists; the schema has each name once.
            if (!done.Add(ids[type])) continue;
            JsonObject entity = type.Describe(NameOf);
            entity.Insert(0, "name", ids[type]);
            result.Add((JsonNode)entity);
        }
        return result;
    }
}
