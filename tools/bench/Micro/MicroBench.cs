using BenchmarkDotNet.Columns;
using BenchmarkDotNet.Configs;
using BenchmarkDotNet.Exporters.Json;
using BenchmarkDotNet.Jobs;
using BenchmarkDotNet.Loggers;
using BenchmarkDotNet.Order;
using BenchmarkDotNet.Running;
using BenchmarkDotNet.Toolchains.InProcess.NoEmit;

namespace Vmm.Tools.Bench.Micro;

/// <summary>Runs the benchmarks of single functions in this process: a build of its own, as BenchmarkDotNet makes by default, would not have this one's settings.</summary>
internal static class MicroBench
{
    private static readonly Type[] s_all = [typeof(ZeroScanBench), typeof(BitmapBench), typeof(CodecBench)];

    /// <summary>Runs the benchmarks whose names match a pattern.</summary>
    /// <param name="filter">Pattern with <c>*</c>, of Class.Method.</param>
    /// <param name="isShort">One iteration each, which only shows that they run.</param>
    /// <param name="folder">Folder for BenchmarkDotNet's reports, or null for a temporary one that is removed.</param>
    internal static int Run(string filter, bool isShort, string? folder)
    {
        DirectoryInfo? temporary = folder is null ? Directory.CreateTempSubdirectory("vmm-bench-") : null;
        try
        {
            Job job = (isShort ? Job.Dry : Job.Default).WithToolchain(InProcessNoEmitToolchain.Instance);
            IConfig config = ManualConfig.CreateEmpty().AddJob(job).AddColumnProvider(DefaultColumnProviders.Instance).AddLogger(ConsoleLogger.Default)
                .AddExporter(JsonExporter.Full).WithOrderer(new DefaultOrderer(SummaryOrderPolicy.Declared)).WithArtifactsPath(folder ?? temporary!.FullName);
            IEnumerable<BenchmarkDotNet.Reports.Summary> summaries = BenchmarkSwitcher.FromTypes(s_all).Run(["--filter", filter], config);
            return summaries.Any() && summaries.All(static s => !s.HasCriticalValidationErrors && s.Reports.All(static r => r.Success)) ? 0 : 1;
        }
        finally
        {
            temporary?.Delete(recursive: true);
        }
    }
}
