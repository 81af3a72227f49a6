using System.Globalization;
using Vmm.Core.Errors;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Update;

/// <summary>
/// What the old process tells the new one in an environment variable: lines <c>key=value</c>. With exec it is read while the guest stands still,
/// hence no JSON, whose reader would have to be compiled first.
/// </summary>
internal sealed record UpdateTicket
{
    internal const string Variable = "VMM_UPDATE";
    private const string PidKey = "pid", StoppedKey = "stopped-at-ns", MainKey = "main", CprKey = "cpr", ReportKey = "report", RemoveKey = "remove";

    internal required UpdateChannels Channels { get; init; }

    /// <summary>Where the old process takes reports; null with exec.</summary>
    internal string? ReportPath { get; init; }

    /// <summary>A directory to remove once the VM has arrived, which only exec leaves behind; or null.</summary>
    internal string? RemoveDirectory { get; init; }

    /// <summary>With exec, CLOCK_MONOTONIC in ns: when the VM stopped; 0 while it runs or when it was stopped before.</summary>
    internal long StoppedAtNs { get; init; }

    /// <exception cref="ConfigurationException">A path has a line end in it.</exception>
    internal string ToText()
    {
        (string Key, string? Value)[] all =
        [
            (PidKey, Channels.OldPid.ToString(CultureInfo.InvariantCulture)), (StoppedKey, StoppedAtNs.ToString(CultureInfo.InvariantCulture)),
            (MainKey, Channels.Main.Path), (CprKey, Channels.Cpr?.Path), (ReportKey, ReportPath), (RemoveKey, RemoveDirectory),
        ];
        if (Array.Find(all, static m => m.Value?.Contains('\n', StringComparison.Ordinal) == true).Value is { } bad)
            throw new ConfigurationException($"update: path '{bad}' has a line end in it");
        return string.Join('\n', all.Where(static m => m.Value is not null).Select(static m => $"{m.Key}={m.Value}"));
    }

    /// <exception cref="ConfigurationException">The text is not a ticket.</exception>
    internal static UpdateTicket Parse(string text)
    {
        var values = new Dictionary<string, string>(StringComparer.Ordinal);
        foreach (string line in text.Split('\n'))
        {
            int at = line.IndexOf('=', StringComparison.Ordinal);
            if (at < 0 || !values.TryAdd(line[..at], line[(at + 1)..])) throw Bad(text, $"line '{line}' has no key of its own");
        }
        string main = values.GetValueOrDefault(MainKey) ?? throw Bad(text, $"'{MainKey}' is missing");
        string? cpr = values.GetValueOrDefault(CprKey);
        return new UpdateTicket
        {
            Channels = new UpdateChannels((int)Number(text, values, PidKey, int.MaxValue),
                new MigrationAddress { Transport = cpr is null ? MigrationTransport.File : MigrationTransport.Unix, Path = main }, cpr is null ? null : Unix(cpr)),
            StoppedAtNs = Number(text, values, StoppedKey, long.MaxValue),
            ReportPath = values.GetValueOrDefault(ReportKey),
            RemoveDirectory = values.GetValueOrDefault(RemoveKey),
        };
    }

    internal static MigrationAddress Unix(string path) => new() { Transport = MigrationTransport.Unix, Path = path };

    private static long Number(string text, Dictionary<string, string> values, string key, long most)
    {
        string? value = values.GetValueOrDefault(key);
        return long.TryParse(value, NumberStyles.None, CultureInfo.InvariantCulture, out long number) && number <= most
            ? number : throw Bad(text, $"'{key}' must be a number from 0 to {most}, found '{value}'");
    }

    private static ConfigurationException Bad(string text, string why) => new($"environment variable {Variable}='{text.ReplaceLineEndings(" ")}' does not describe an update: {why}");
}
