using System.Globalization;
using System.Text.Json.Nodes;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Engine;
using Vmm.Migration.Parameters;
using Vmm.Migration.Status;

namespace Vmm.Migration.Qmp;

/// <summary>The migration commands (qmp 8). The engine decides what a migration may do; this class maps names and texts.</summary>
internal sealed class QmpMigrationCommands(QmpServer server, Vm vm, IMigrationEngine engine)
{
    private readonly Lock _gate = new();
    private bool _incomingStarted, _exitOnError;

    internal IEnumerable<QmpCommand> Commands()
    {
        QmpMember uri = new("uri", QmpType.Str, true), channels = new("channels", QmpMigrationTypes.Channels, true);
        var yankInstance = new QmpObject(new QmpMember("type", new QmpEnum("block-node", "chardev", "migration")))
        {
            Tag = "type",
            Variants = new Dictionary<string, QmpObject>
            {
                ["block-node"] = new(new QmpMember("node-name", QmpType.Str)), ["chardev"] = new(new QmpMember("id", QmpType.Str)),
            },
        };
        var instances = new QmpArray(yankInstance);
        yield return new("migrate", new(uri, channels, new("detach", QmpType.Bool, true, Hidden: true), new("resume", QmpType.Bool, true)),
            QmpObject.Empty, Migrate);
        yield return new("migrate-incoming", new(uri, channels, new("exit-on-error", QmpType.Bool, true)), QmpObject.Empty, MigrateIncoming);
        yield return new("migrate_cancel", _ => { engine.Cancel(); return null; });
        yield return new("migrate-continue", new(new QmpMember("state", QmpEvents.MigrationStatus)), QmpObject.Empty, c => Continue(c.Str("state")));
        yield return new("migrate-set-capabilities", new(new QmpMember("capabilities", QmpMigrationTypes.CapabilityStatus)), QmpObject.Empty, SetCapabilities);
        yield return new("query-migrate-capabilities", QmpObject.Empty, QmpMigrationTypes.CapabilityStatus, QueryCapabilities);
        yield return new("migrate-set-parameters", QmpMigrationTypes.Parameters, QmpObject.Empty, SetParameters);
        yield return new("query-migrate-parameters", QmpObject.Empty, QmpMigrationTypes.Parameters, QueryParameters);
        yield return new("query-migrate", QmpObject.Empty, QmpMigrationTypes.MigrationInfo, _ => QmpMigrationInfo.ToJson(engine.Query()));
        yield return new("query-migrationthreads", QmpObject.Empty, QmpType.Any, Threads) { Hidden = true };
        yield return new("yank", new(new QmpMember("instances", instances)), QmpObject.Empty, Yank) { AllowOob = true };
        yield return new("query-yank", QmpObject.Empty, instances, QueryYank) { AllowOob = true };
    }

    /// <summary>Starts an outgoing migration.</summary>
    internal Task<MigrationStatus> Start(MigrationAddress address, MigrationAddress? cpr = null) => engine.Migrate(address, cpr);

    /// <summary>Starts waiting for an incoming migration.</summary>
    internal void StartIncoming(MigrationAddress address, bool exitOnError)
    {
        lock (_gate)
        {
            bool retry = _incomingStarted && !_exitOnError && engine.Status is MigrationStatus.Failed or MigrationStatus.Cancelled;
            if (vm.RunState.State != RunState.InMigrate && !_incomingStarted) throw new QmpErrorException("'-incoming' was not specified on the command line");
            if (_incomingStarted && !retry) throw new QmpErrorException("The incoming migration has already been started");
            Task<MigrationStatus> incoming = engine.MigrateIncoming(address);
            (_incomingStarted, _exitOnError) = (true, exitOnError);
            if (exitOnError)
                incoming.ContinueWith(t => ExitIfFailed(t.Result), CancellationToken.None, TaskContinuationOptions.ExecuteSynchronously, TaskScheduler.Default);
        }
    }

    internal JsonNode? Continue(string state)
    {
        var wanted = (MigrationStatus)IndexOf(MigrationStatusNames.All, state);
        if (engine.Status != wanted || wanted != MigrationStatus.PreSwitchover)
            throw new QmpErrorException($"Migration not in expected state: {engine.Status.ToWireName()}");
        engine.Continue(wanted);
        return null;
    }

    internal void SetCapabilities(IEnumerable<KeyValuePair<MigrationCapability, bool>> changes)
    {
        lock (_gate)
        {
            // A destination in setup only listens, so its capabilities may still change.
            if (!engine.Status.IsTerminal() && !(engine.Status == MigrationStatus.Setup && vm.RunState.State == RunState.InMigrate))
                throw new QmpErrorException("There's a migration process in progress");
            engine.SetCapabilities(changes);
        }
    }

    private void ExitIfFailed(MigrationStatus status)
    {
        if (status != MigrationStatus.Failed) return;
        string reason = engine.Query().Error?.ToString() ?? "the incoming migration failed";
        server.Log.IncomingFailed(reason);
        server.RequestQuit(1, reason);
    }

    private JsonNode? Migrate(QmpCall call)
    {
        (MigrationAddress address, MigrationAddress? cpr) = Addresses(call);
        if (call.Bool("resume", false))
        {
            throw new QmpErrorException("Cannot resume if there is no paused migration")
            {
                Hint = "'resume' belongs to postcopy, which is not implemented in this version of vmm",
            };
        }
        Start(address, cpr);
        return null;
    }

    private JsonNode? MigrateIncoming(QmpCall call)
    {
        (MigrationAddress address, MigrationAddress? cpr) = Addresses(call);
        // As in QEMU: the descriptors must come before there is a monitor.
        if (cpr is not null) throw new QmpErrorException("Channel type 'cpr' is only for the command line");
        StartIncoming(address, call.Bool("exit-on-error", true));
        return null;
    }

    private static (MigrationAddress Main, MigrationAddress? Cpr) Addresses(QmpCall call)
    {
        string? uri = call.TryStr("uri");
        JsonArray channels = call.Arguments["channels"] as JsonArray ?? [];
        if (uri is null == (channels.Count == 0)) throw new QmpErrorException("need either 'uri' or 'channels' argument");
        if (uri is not null) return (MigrationAddress.Parse(uri), null);
        MigrationAddress? main = null, cpr = null;
        foreach (JsonNode? channel in channels)
        {
            var address = QmpAddress.Parse((JsonObject)channel!["addr"]!);
            string type = channel["channel-type"]!.GetValue<string>();
            ref MigrationAddress? place = ref type == "cpr" ? ref cpr : ref main;
            if (place is not null) throw new QmpErrorException($"Channel list has more than one {type} entry");
            place = address;
        }
        return (main ?? throw new QmpErrorException("Channel list has no main entry"), cpr);
    }

    private JsonNode? SetCapabilities(QmpCall call)
    {
        SetCapabilities(call.Array("capabilities").Select(static one => KeyValuePair.Create(
            (MigrationCapability)IndexOf(MigrationCapabilityNames.All, one!["capability"]!.GetValue<string>()), one["state"]!.GetValue<bool>())));
        return null;
    }

    private JsonArray QueryCapabilities(QmpCall call) =>
        [.. Enum.GetValues<MigrationCapability>().Select(c => new JsonObject { ["state"] = engine.Capabilities.IsOn(c), ["capability"] = c.ToWireName() })];

    private JsonNode? SetParameters(QmpCall call)
    {
        engine.SetParameters(call.Arguments.Select(static a =>
        {
            MigrationParameter parameter = MigrationParameterTable.Find(a.Key)!;
            return KeyValuePair.Create(parameter, QmpMigrationInfo.ParameterValue(parameter, a.Value));
        }));
        return null;
    }

    private JsonObject QueryParameters(QmpCall call)
    {
        MigrationParameters current = engine.Parameters;
        return new JsonObject(MigrationParameterTable.All.Select(p => KeyValuePair.Create<string, JsonNode?>(p.Name, QmpMigrationInfo.ParameterJson(p.Get(current)))));
    }

    // QEMU 11.0 removed this command, but some tools still send it. The process id stands for all threads, which are managed.
    private JsonArray Threads(QmpCall call) => engine.Status.IsTerminal() || engine.Query().IsIncoming
        ? []
        : [new JsonObject { ["name"] = "live_migration", ["thread-id"] = Environment.ProcessId }];

    private JsonNode? Yank(QmpCall call)
    {
        foreach (JsonNode? instance in call.Array("instances"))
            if ((string?)instance!["type"] != "migration" || engine.Status.IsTerminal())
                throw new QmpErrorException(QmpErrorClass.DeviceNotFound, "Instance not found");
        if (call.Array("instances").Count > 0) engine.Yank();
        return null;
    }

    private JsonArray QueryYank(QmpCall call) => engine.Status.IsTerminal() ? [] : [new JsonObject { ["type"] = "migration" }];

    internal static int IndexOf(IReadOnlyList<string> names, string name)
    {
        for (int i = 0; i < names.Count; i++)
            if (names[i] == name) return i;
        throw new QmpErrorException(string.Create(CultureInfo.InvariantCulture, $"invalid parameter value: {name}"));
    }
}
