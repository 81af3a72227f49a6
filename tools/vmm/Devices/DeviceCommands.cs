using System.Text.Json.Nodes;
using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Logging;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Tools.Cli.Hosting;
using Vmm.Tools.Cli.Shell;
using Vmm.Tools.Devices;

namespace Vmm.Tools.Cli.Devices;

/// <summary><c>vmm device</c>: devices served over vfio-user, without a VM.</summary>
internal sealed class DeviceCommands(CliContext context)
{
    /// <summary><c>vmm device list</c>.</summary>
    public ExitCode List(bool json)
    {
        if (json) Format.WriteJson(context.Out, new JsonArray([.. DeviceTypes.All.Select(static t => new JsonObject { ["type"] = t.TypeName, ["summary"] = t.Summary })]));
        else Format.WriteTable(context.Out, [.. DeviceTypes.All.Select(static t => (string[])[t.TypeName, t.Summary])]);
        return ExitCode.Ok;
    }

    /// <summary><c>vmm device serve</c>: prints one line a device when clients can connect, and its counters at the end.</summary>
    public async Task<ExitCode> Serve(IReadOnlyList<string> types, IReadOnlyList<string> paths, bool once, bool verbose)
    {
        if (types.Count != paths.Count) throw CliException.Usage($"{types.Count} --type and {paths.Count} --socket: each device needs both");
        await using ServiceProvider services = VmHost.AddLog(new ServiceCollection(), verbose ? LogLevel.Debug : LogLevel.Warning).BuildServiceProvider();
        ILogger logger = services.GetRequiredService<ILoggerFactory>().CreateLogger("vfio-user");
        var served = new List<Served>();
        try
        {
            for (int i = 0; i < types.Count; i++) served.Add(Served.Open(types[i], paths[i], once, logger));
            foreach (Served one in served) one.Listen(context);
            using CancellationTokenRegistration signal = context.Interrupted.Register(() => served.ForEach(static s => s.Server.Stop()));
            // A server that fails ends the others too, so that the user notices the failure.
            foreach (Served one in served) _ = one.Server.Completed.ContinueWith(_ => served.ForEach(static s => s.Server.Stop()), TaskContinuationOptions.OnlyOnFaulted);
            await Task.WhenAll(served.Select(static s => s.Server.Completed));
            return ExitCode.Ok;
        }
        finally
        {
            foreach (Served one in served) one.Dispose();
            foreach (Served one in served) context.Note($"{one.Path}: {one.Server.Stats}");
        }
    }

    /// <summary>One device and its server.</summary>
    private sealed record Served(string Path, IVfioUserBackend Backend, VfioUserServer Server) : IDisposable
    {
        internal static Served Open(string text, string path, bool once, ILogger logger)
        {
            DeviceOptions options = DeviceOptions.Parse(text);
            IVfioUserDeviceType type = DeviceTypes.All.FirstOrDefault(t => t.TypeName == options.TypeName)
                ?? throw new ConfigurationException($"no device type '{options.TypeName}' can be served") { Hint = "'vmm device list' lists the types" };
            // Read the server's options first, because the device refuses options that nobody has read.
            bool onlySealed = options.GetString("map-memory", "on") == "sealed";
            var server = new VfioUserServerOptions
            {
                MapOnlySealed = onlySealed,
                LegacyMigrationRegion = options.GetBool("legacyMigrationRegion", false), MapClientMemory = onlySealed || options.GetBool("map-memory", true),
                TwinSocket = options.GetBool("twin-socket", true), Once = once, Logger = logger,
            };
            IVfioUserBackend backend = type.Create(options);
            return new Served(path, backend, new VfioUserServer(backend, server));
        }

        internal void Listen(CliContext context)
        {
            Server.Listen(Path);
            context.Note($"serving {Backend.TypeName} at {Path}, pid {Environment.ProcessId}");
        }

        public void Dispose()
        {
            Server.Dispose();
            Backend.Dispose();
        }
    }
}
