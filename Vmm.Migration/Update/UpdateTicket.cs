using System.Globalization;
using Vmm.Core.Errors;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Update;

/// <summary>
/// What the old process tells the new one in an environment variable, as lines <c>key=value</c>. It is not JSON because with exec the new program reads
/// it while the guest is stopped, and the runtime would have to compile a JSON reader first.
/// </summary>
internal sealed record UpdateTicket
{
    internal const string Variable = "VMM_UPDATE";
    private const string PidKey = "pid", StoppedKey = "stopped-at-ns", MainKey = "main", CprKey = "cpr", ReportKey = "report", RemoveKey = "remove", TrialKey = "trial", SectionsKey = "sections";

    internal required UpdateChannels Channels { get; init; }

    /// <summary>The socket on which the old process receives reports; null with exec.</summary>
    internal string? ReportPath { get; init; }

    /// <summary>A directory that the new program must remove once the VM has arrived, with exec; or null.</summary>
    internal string? RemoveDirectory { get; init; }

    /// <summary>With exec, CLOCK_MONOTONIC in ns: when the update stopped the VM; 0 if it runs or was stopped before.</summary>
    internal long StoppedAtNs { get; init; }

    /// <summary>With exec: a word that the new program must report to prove itself in a trial; null for the update itself.</summary>
    internal string? TrialWord { get; init; }

    /// <summary>In a trial: the declared sections of the VM, as <c>NAME VERSION</c> with <c>;</c> between them.</summary>
    internal string? Sections { get; init; }

    /// <exception cref="ConfigurationException">A path contains a line break.</exception>
    internal string ToText()
    {
        (string Key, string? Value)[] all =
        [
            (PidKey, Channels.OldPid.ToString(CultureInfo.InvariantCulture)), (StoppedKey, StoppedAtNs.ToString(CultureInfo.InvariantCulture)),
            (MainKey, Channels.Main.Path), (CprKey, Channels.Cpr?.Path), (ReportKey, ReportPath), (RemoveKey, RemoveDirectory), (TrialKey, TrialWord), (SectionsKey, Sections),
        ];
        if (Array.Find(all, static m => m.Value?.Contains('\n', StringComparison.Ordinal) == true).Value is { } bad)
            throw new ConfigurationException($"update: path '{bad}' contains a line break");
        return string.Join('\n', all.Where(static m => m.Value is not null).Select(static m => $"{m.Key}={m.Value}"));
    }

    /// <exception cref="ConfigurationException">The text is not a ticket.</exception>
    internal static UpdateTicket Parse(string text)
    {
        var values = new Dictionary<string, string>(StringComparer.Ordinal);
        foreach (string line in text.Split('\n'))
        {
            int at = line.IndexOf('=', StringComparison.Ordinal);
            if (at < 0 || !values.TryAdd(line[..at], line[(at + 1)..])) throw Bad(text, $"line '{line}' has no key, or one that another line has too");
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
            TrialWord = values.GetValueOrDefault(TrialKey),
            Sections = values.GetValueOrDefault(SectionsKey),
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
