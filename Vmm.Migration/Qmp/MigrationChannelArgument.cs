using System.Text.Json;
using System.Text.Json.Nodes;
using Vmm.Core.Errors;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Qmp;

/// <summary>The value of <c>--incoming</c>: a URI, or QMP's MigrationChannel as JSON (qmp 8.2).</summary>
/// <param name="IsCpr">True for channel type cpr, which brings the descriptors; false for main.</param>
/// <param name="Address">The address to listen on; null for <c>defer</c>.</param>
internal sealed record MigrationChannelArgument(bool IsCpr, MigrationAddress? Address)
{
    /// <summary>Parses an argument.</summary>
    /// <param name="text">E.g. <c>tcp:127.0.0.1:0</c>, <c>defer</c>, or <c>{"channel-type":"cpr","addr":{...}}</c>.</param>
    /// <returns>The channel.</returns>
    /// <exception cref="ConfigurationException">The text is neither a URI nor a channel; the message says why.</exception>
    public static MigrationChannelArgument Parse(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        if (text == "defer") return new(false, null);
        if (!text.StartsWith('{')) return new(false, MigrationAddress.Parse(text));
        try
        {
            JsonNode? channel = JsonNode.Parse(text);
            QmpMigrationTypes.Channels.Check(new JsonArray(channel?.DeepClone()), "channels", "channels");
            return new(channel!["channel-type"]!.GetValue<string>() == "cpr", QmpAddress.Parse((JsonObject)channel["addr"]!));
        }
        catch (Exception e) when (e is JsonException or QmpErrorException)
        {
            throw new ConfigurationException($"not a migration channel: {e.Message}", e) { Hint = """as {"channel-type":"cpr","addr":{"transport":"socket","type":"unix","path":"PATH"}}""" };
        }
    }

    /// <summary>The JSON that <see cref="Parse"/> reads for a UNIX socket.</summary>
    /// <param name="type"><c>main</c> or <c>cpr</c>.</param>
    /// <param name="path">Path of the socket.</param>
    /// <returns>The JSON text.</returns>
    public static string Unix(string type, string path) => new JsonObject
    {
        ["channel-type"] = type,
        ["addr"] = new JsonObject { ["transport"] = "socket", ["type"] = "unix", ["path"] = path },
    }.ToJsonString();
}
