using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Logging;
using Microsoft.Extensions.Logging.Console;
using Vmm.Core.Devices;
using Vmm.Core.Kvm;
using Vmm.Core.Workloads;
using Vmm.Devices.Vfio;
using Vmm.Migration;
using Vmm.Migration.Qmp;
using Vmm.Migration.Snapshot;
using Vmm.Migration.Update;
using Vmm.Tools.Devices;

namespace Vmm.Tools.Cli.Hosting;

/// <summary>Registers the plugins and services of a VM of <c>vmm</c>.</summary>
internal static class VmHost
{
    /// <summary>The default directory of a VM's snapshots: one per VM name, so that a later VM of that name finds them again.</summary>
    public static string DefaultSnapshotDirectory(Func<string, string?> getVariable, string? name)
    {
        string? state = getVariable("XDG_STATE_HOME");
        if (string.IsNullOrEmpty(state) || !Path.IsPathRooted(state)) state = Path.Combine(getVariable("HOME") ?? "/", ".local", "state");
        return Path.Combine(state, "vmm", "snapshots", name ?? "unnamed");
    }

    /// <summary>Builds the container.</summary>
    /// <param name="verbose">True logs to stderr from level Debug; false logs nothing.</param>
    /// <param name="snapshotDirectory">Directory of the snapshots, or null for a host without snapshots.</param>
    /// <param name="rehearsal">Options of rehearsals, or null for a host that moves no VM.</param>
    public static ServiceProvider Build(bool verbose, string? snapshotDirectory = null, MoveRehearsalOptions? rehearsal = null)
    {
        var services = new ServiceCollection();
        if (rehearsal is not null) services.AddSingleton(rehearsal);
        if (snapshotDirectory is not null) services.AddSingleton(new SnapshotOptions { Directory = snapshotDirectory });
        if (verbose) AddLog(services, LogLevel.Debug);
        services.AddVmm().AddMigration().AddQmp().AddPlugin<SerialPlugin>().AddPlugin<WorkloadPlugin>().AddPlugin<VfioPlugin>().AddPlugin<EduPlugin>().AddPlugin<EduGuestPlugin>().AddPlugin<KvmPlugin>();
        return services.BuildServiceProvider();
    }

    /// <summary>Logs to stderr.</summary>
    public static IServiceCollection AddLog(IServiceCollection services, LogLevel minimum) => services.AddLogging(logging => logging
        .SetMinimumLevel(minimum)
        .AddSimpleConsole(static o => { o.SingleLine = true; o.TimestampFormat = "HH:mm:ss.fff "; o.ColorBehavior = LoggerColorBehavior.Disabled; })
        .Services.Configure<ConsoleLoggerOptions>(static o => o.LogToStandardErrorThreshold = LogLevel.Trace));
}
