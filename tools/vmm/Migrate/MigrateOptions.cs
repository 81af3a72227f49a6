using System.Globalization;
using System.Text.Json.Nodes;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Migration.Channels;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Migrate;

/// <summary>The options of <c>vmm migrate</c>, checked as far as possible without the VM.</summary>
internal sealed record MigrateOptions
{
    /// <summary>The parsed address.</summary>
    public required MigrationAddress Address { get; init; }

    /// <summary>The URI to send.</summary>
    public required string Uri { get; init; }

    public IReadOnlyList<KeyValuePair<string, string>> Parameters { get; init; } = [];

    public IReadOnlyList<KeyValuePair<string, bool>> Capabilities { get; init; } = [];

    public TimeSpan? Timeout { get; init; }

    /// <summary>Checks the texts.</summary>
    /// <exception cref="CliException">Exit code usage; the message names the option.</exception>
    public static MigrateOptions Parse(string to, IReadOnlyList<string> set, IReadOnlyList<string> capability, double? timeoutSeconds)
    {
        try
        {
            MigrationAddress address = ParseAddress(to);
            return new MigrateOptions
            {
                Address = address,
                Uri = address.Transport is MigrationTransport.File or MigrationTransport.Unix ? address.ToString() : to,
                Parameters = [.. set.Select(static s => OptionList.Pair(s, "--set"))],
                Capabilities = WithReturnPath([.. capability.Select(ParseCapability)], address),
                Timeout = timeoutSeconds is null ? null
                    : timeoutSeconds > 0 ? TimeSpan.FromSeconds(timeoutSeconds.Value) : throw CliException.Usage("--timeout: expected a positive number of seconds"),
            };
        }
        catch (ConfigurationException e)
        {
            throw new CliException(ExitCode.Usage, e.Message, e) { Hint = e.Hint };
        }
    }

    /// <summary>
    /// Builds the arguments of migrate-set-parameters. Each value gets the type that it has in <paramref name="known"/>, the VM's answer of
    /// query-migrate-parameters. Sizes may have the suffix K, M, G or T.
    /// </summary>
    public JsonObject ParameterArguments(JsonObject known)
    {
        var arguments = new JsonObject();
        foreach ((string name, string value) in Parameters)
        {
            if (!known.TryGetPropertyValue(name, out JsonNode? now))
                throw CliException.Usage($"--set: parameter '{name}' is not known to this VM; known: {string.Join(", ", known.Select(static p => p.Key).Order())}");
            if (arguments.ContainsKey(name)) throw CliException.Usage($"--set: parameter '{name}' is given twice");
            arguments[name] = Value(name, value, now);
        }
        return arguments;
    }

    /// <summary>Builds the arguments of migrate-set-capabilities. <paramref name="known"/> is the VM's answer of query-migrate-capabilities.</summary>
    public JsonObject CapabilityArguments(JsonArray known)
    {
        var names = known.Select(static c => c?["capability"]?.ToString() ?? string.Empty).ToHashSet(StringComparer.Ordinal);
        var list = new JsonArray();
        foreach ((string name, bool on) in Capabilities)
        {
            if (!names.Contains(name)) throw CliException.Usage($"--capability: '{name}' is not known to this VM; known: {string.Join(", ", names.Order())}");
            list.Add(new JsonObject { ["capability"] = name, ["state"] = on });
        }
        return new JsonObject { ["capabilities"] = list };
    }

    private static MigrationAddress ParseAddress(string to)
    {
        try
        {
            MigrationAddress address = MigrationAddress.Parse(to).Rooted();
            if (address is { Transport: MigrationTransport.Tcp, Port: 0 }) throw new ConfigurationException("port 0 is for the side that listens");
            if (address is { Transport: MigrationTransport.Tcp, Host: "" }) throw new ConfigurationException("the host is missing");
            return address;
        }
        catch (ConfigurationException e)
        {
            throw new CliException(ExitCode.Usage, $"--to '{to}': {e.Message}", e) { Hint = e.Hint };
        }
    }

    private static KeyValuePair<string, bool> ParseCapability(string text)
    {
        int at = text.IndexOf('=', StringComparison.Ordinal);
        string name = at < 0 ? text : text[..at];
        return new(name, at < 0 || OptionList.Bool(text[(at + 1)..], $"--capability: '{name}'"));
    }

    // Switches return-path on for sockets, so that the destination confirms that it runs. Switches it off for other transports, on which the destination
    // cannot answer: an earlier migration may have left it on.
    private static List<KeyValuePair<string, bool>> WithReturnPath(List<KeyValuePair<string, bool>> given, MigrationAddress address)
    {
        if (given.GroupBy(static c => c.Key).FirstOrDefault(static g => g.Count() > 1) is { } twice)
            throw CliException.Usage($"--capability: '{twice.Key}' is given twice");
        if (!given.Exists(static c => c.Key == "return-path")) given.Add(new("return-path", address.IsSocket));
        return given;
    }

    private static JsonNode Value(string name, string value, JsonNode? now)
    {
        string what = $"--set: parameter '{name}'";
        if (now is JsonValue flag && flag.TryGetValue(out bool _)) return OptionList.Bool(value, what);
        if (now is JsonValue number && (number.TryGetValue(out long _) || number.TryGetValue(out ulong _)))
        {
            try
            {
                ulong bytes = OptionList.SizeBytes(value.EndsWith("/s", StringComparison.Ordinal) ? value[..^2] : value, what);
                return bytes <= long.MaxValue ? (long)bytes : bytes;
            }
            catch (ConfigurationException e)
            {
                throw new CliException(ExitCode.Usage, $"{what} expects a number, found '{value}'", e);
            }
        }
        if (now is JsonArray) return new JsonArray([.. value.Split(' ', StringSplitOptions.RemoveEmptyEntries).Select(static v => (JsonNode)v)]);
        return value;
    }
}
