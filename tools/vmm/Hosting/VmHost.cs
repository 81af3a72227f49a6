using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Logging;
using Microsoft.Extensions.Logging.Console;
using Vmm.Core.Devices;
using Vmm.Devices.Vfio;
using Vmm.Migration;

namespace Vmm.Tools.Cli.Hosting;

/// <summary>The composition: which plugins and services a <c>vmm</c> VM has.</summary>
internal static class VmHost
{
    /// <summary>Builds the container.</summary>
    /// <param name="verbose">Log everything from Debug up to stderr; otherwise nothing.</param>
    public static ServiceProvider Build(bool verbose)
    {
        var services = new ServiceCollection();
        if (verbose)
        {
            services.AddLogging(static logging => logging
                .SetMinimumLevel(LogLevel.Debug)
                .AddSimpleConsole(static o => { o.SingleLine = true; o.TimestampFormat = "HH:mm:ss.fff "; o.ColorBehavior = LoggerColorBehavior.Disabled; })
                .Services.Configure<ConsoleLoggerOptions>(static o => o.LogToStandardErrorThreshold = LogLevel.Trace));
        }
        services.AddVmm().AddMigration().AddPlugin<SerialPlugin>().AddPlugin<ScratchPlugin>().AddPlugin<VfioPlugin>();
        return services.BuildServiceProvider();
    }
}
