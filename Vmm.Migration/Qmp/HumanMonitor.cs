using System.Globalization;
using System.Text;
using System.Text.Json.Nodes;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Engine;
using Vmm.Migration.Parameters;
using Vmm.Migration.Snapshot;
using Vmm.Migration.Status;

namespace Vmm.Migration.Qmp;
using Nito.AsyncEx.Synchronous;

/// <summary>Implements human-monitor-command for the lines that scripts use (qmp 10). Errors are text in the answer, never QMP errors.</summary>
internal sealed class HumanMonitor
{
    private readonly Vm _vm;
    private readonly IMigrationEngine _engine;
    private readonly ISnapshotService? _snapshots;
    private readonly QmpMigrationCommands _migration;
    private readonly Dictionary<string, Line> _lines;

    internal HumanMonitor(Vm vm, IMigrationEngine engine, ISnapshotService? snapshots, QmpMigrationCommands migration)
    {
        (_vm, _engine, _snapshots, _migration) = (vm, engine, snapshots, migration);
        Line[] lines =
        [
            new("info migrate", "a", 0, 0, c => HumanText.Migrate(_engine.Query(), c.Has('a'), _vm.Options.OnlyMigratable)),
            new("info migrate_capabilities", "", 0, 0, _ => HumanText.Capabilities(_engine.Capabilities)),
            new("info migrate_parameters", "", 0, 0, _ => HumanText.Parameters(_engine.Parameters)),
            new("info status", "", 0, 0, _ => Status()),
            new("info snapshots", "", 0, 0, _ => HumanText.Snapshots(Store.List())),
            new("info version", "", 0, 0, _ => Version()),
            new("info name", "", 0, 0, _ => _vm.Name ?? string.Empty),
            new("stop", "", 0, 0, _ => Nothing(_vm.Stop)),
            new("cont", "", 0, 0, _ => Nothing(_vm.Cont)),
            new("savevm", "", 0, 1, SaveVm),
            new("loadvm", "", 1, 1, LoadVm),
            new("delvm", "", 1, 1, DelVm),
            new("migrate", "dr", 1, 1, Migrate),
            new("migrate_incoming", "", 1, 1, c => Nothing(() => _migration.StartIncoming(MigrationAddress.Parse(c.Words[0]), exitOnError: false))),
            new("migrate_cancel", "", 0, 0, _ => Nothing(_engine.Cancel)),
            new("migrate_continue", "", 1, 1, c => Nothing(() => _migration.Continue(c.Words[0]))),
            new("migrate_set_capability", "", 2, 2, SetCapability),
            new("migrate_set_parameter", "", 2, 2, SetParameter),
        ];
        _lines = lines.ToDictionary(static l => l.Name);
    }

    private const string NoStore = "no block device can store vmstate for snapshot";

    private sealed record Line(string Name, string Flags, int MinWords, int MaxWords, Func<Call, string> Run);

    private sealed record Call(IReadOnlyList<string> Words, string Flags, QmpCall Request)
    {
        internal bool Has(char flag) => Flags.Contains(flag, StringComparison.Ordinal);
    }

    internal IEnumerable<QmpCommand> Commands()
    {
        yield return new("human-monitor-command", new(new("command-line", QmpType.Str), new("cpu-index", QmpType.Int, true)), QmpType.Str,
            c => JsonValue.Create(Execute(c.Str("command-line"), c)));
    }

    /// <summary>Runs one line; the answer is empty or ends in CRLF.</summary>
    private string Execute(string text, QmpCall request)
    {
        string answer;
        try
        {
            answer = Run(text, request);
        }
        catch (VmmException e)
        {
            string hint = e.Hint is null ? string.Empty : $" (hint: {e.Hint})";
            answer = $"Error: {VmmException.Describe(e)}{hint}";
        }
        if (answer.Length == 0) return answer;
        string lines = answer.ReplaceLineEndings("\r\n");
        return lines.EndsWith('\n') ? lines : lines + "\r\n";
    }

    private string Run(string text, QmpCall request)
    {
        List<string> words = Split(text);
        if (words.Count == 0) return string.Empty;
        if (HumanPorts.IsOne(words[0]))
            using (_vm.Bql.Acquire()) return HumanPorts.Run(_vm.Pci, words);
        string name = words[0] == "info" && words.Count > 1 ? $"info {words[1]}" : words[0];
        if (!_lines.TryGetValue(name, out Line? line)) return $"unknown command: '{name}'";
        words.RemoveRange(0, name.Contains(' ', StringComparison.Ordinal) ? 2 : 1);
        string help = $"\nTry \"help {name}\" for more information";
        var flags = new StringBuilder();
        while (words.Count > 0 && words[0].Length > 1 && words[0][0] == '-' && line.Flags.Length > 0)
        {
            foreach (char flag in words[0].AsSpan(1))
                if (!line.Flags.Contains(flag, StringComparison.Ordinal)) return $"{name}: unsupported option -{flag}{help}";
            flags.Append(words[0], 1, words[0].Length - 1);
            words.RemoveAt(0);
        }
        if (words.Count < line.MinWords) return $"{name}: string expected{help}";
        if (words.Count > line.MaxWords) return $"{name}: extraneous characters at the end of line{help}";
        return line.Run(new Call(words, flags.ToString(), request));
    }

    private static List<string> Split(string text)
    {
        var words = new List<string>();
        var word = new StringBuilder();
        bool quoted = false, any = false;
        foreach (char c in text)
        {
            if (c == '"') (quoted, any) = (!quoted, true);
            else if (quoted || !char.IsWhiteSpace(c)) word.Append(c);
            if ((quoted || !char.IsWhiteSpace(c)) || (word.Length == 0 && !any)) continue;
            words.Add(word.ToString());
            word.Clear();
            any = false;
        }
        if (word.Length > 0 || any) words.Add(word.ToString());
        return words;
    }

    private static string Nothing(Action action)
    {
        action();
        return string.Empty;
    }

    private string Status()
    {
        RunState state = _vm.RunState.State;
        bool running = RunStateTable.IsRunning(state);
        return running || state == RunState.Paused ? $"VM status: {(running ? "running" : "paused")}" : $"VM status: paused ({state.ToWireName()})";
    }

    private static string Version()
    {
        JsonObject version = QmpServer.Version();
        return $"{version["qemu"]!["major"]}.{version["qemu"]!["minor"]}.{version["qemu"]!["micro"]}{version["package"]}";
    }

    private ISnapshotService Store => _snapshots ?? throw new QmpErrorException(NoStore);

    private string SaveVm(Call call)
    {
        string name = call.Words.Count > 0 ? call.Words[0] : $"vm-{DateTime.Now.ToString("yyyyMMddHHmmss", CultureInfo.InvariantCulture)}";
        Store.Save(name, overwrite: true, progress: null, call.Request.Stopping);
        return string.Empty;
    }

    private string LoadVm(Call call)
    {
        string name = call.Words[0];
        if (!Store.List().Any(s => s.Name == name)) throw new QmpErrorException($"Snapshot '{name}' does not exist in one or more devices");
        Store.Load(name, progress: null, call.Request.Stopping);
        return string.Empty;
    }

    // As in QEMU, deleting a snapshot that does not exist is no error.
    private string DelVm(Call call)
    {
        Store.Delete(call.Words[0]);
        return string.Empty;
    }

    private string Migrate(Call call)
    {
        if (call.Has('r')) throw new QmpErrorException("Cannot resume if there is no paused migration");
        Task<MigrationStatus> end = _migration.Start(MigrationAddress.Parse(call.Words[0]));
        if (call.Has('d')) return string.Empty;
        // Waits for the end as QEMU's monitor does. Only this client waits; other clients and events do not.
        end.WaitAsync(call.Request.Gone).WaitWithoutException();
        return end.IsCompletedSuccessfully && end.Result == MigrationStatus.Failed ? $"Error: {_engine.Query().Error}" : string.Empty;
    }

    private string SetCapability(Call call)
    {
        if (call.Words[1] is not ("on" or "off")) return "Expected 'on' or 'off'\nTry \"help migrate_set_capability\" for more information";
        if (!MigrationCapabilityNames.TryParse(call.Words[0], out MigrationCapability capability)) throw Unknown(call);
        _migration.SetCapabilities([KeyValuePair.Create(capability, call.Words[1] == "on")]);
        return string.Empty;
    }

    private string SetParameter(Call call)
    {
        MigrationParameter parameter = MigrationParameterTable.Find(call.Words[0]) ?? throw Unknown(call);
        _engine.SetParameters([KeyValuePair.Create(parameter, Value(parameter, call.Words[1]))]);
        return string.Empty;
    }

    private static object Value(MigrationParameter parameter, string text)
    {
        switch (parameter.Kind)
        {
            case MigrationParameterKind.Bool when text is "on" or "off": return text == "on";
            case MigrationParameterKind.Bool: throw new ConfigurationException($"Parameter '{parameter.Name}' expects 'on' or 'off'");
            case MigrationParameterKind.Enum or MigrationParameterKind.StringOrNull: return text;
            case MigrationParameterKind.StringList: return text.Split(' ', StringSplitOptions.RemoveEmptyEntries);
            case MigrationParameterKind.Size:
                string size = parameter.IsMiBInHmp && text.All(char.IsAsciiDigit) ? text + "M" : text;
                try
                {
                    return OptionList.SizeBytes(size, parameter.Name);
                }
                catch (ConfigurationException)
                {
                    throw new ConfigurationException($"Invalid size {text}");
                }
            default:
                return ulong.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out ulong n)
                    ? n
                    : throw new ConfigurationException($"Parameter '{parameter.Name}' expects a non-negative number below 2^64");
        }
    }

    private static QmpErrorException Unknown(Call call) => new($"invalid parameter value: {call.Words[0]}");
}
