using System.Buffers.Binary;
using System.Numerics;
using System.Text.Json.Nodes;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Threading;
using Vmm.Migration.Engine;
using Vmm.Migration.Status;

namespace Vmm.Migration.Qmp;

/// <summary>
/// calc-dirty-rate and query-dirty-rate (qmp 8.9). A measurement by dirty bitmap gives way to a migration, because both use one dirty log.
/// Thread-safe.
/// </summary>
internal sealed class QmpDirtyRate(Vm vm, IMigrationEngine engine) : IAsyncDisposable
{
    private const long MinTimeMs = 50, MaxTimeMs = 60_000, MinSamplePages = 128, MaxSamplePages = 16384, DefaultSamplePages = 512;

    private static readonly QmpEnum s_mode = new("page-sampling", "dirty-ring", "dirty-bitmap");
    private static readonly QmpEnum s_unit = new("second", "millisecond");

    private readonly Lock _gate = new();
    private readonly ManualResetEventSlim _stop = new();
    private Task _running = Task.CompletedTask;
    private Measurement _last = new("unstarted", "page-sampling", 0, 0, 0, null);

    private sealed record Measurement(string Status, string Mode, long SamplePages, long TimeMs, long StartSeconds, long? MiBPerSecond);

    internal IEnumerable<QmpCommand> Commands()
    {
        var vcpu = new QmpObject(new("id", QmpType.Int), new("dirty-rate", QmpType.Int));
        var info = new QmpObject(new("dirty-rate", QmpType.Int, true), new("status", new QmpEnum("unstarted", "measuring", "measured")),
            new("start-time", QmpType.Int), new("calc-time", QmpType.Int), new("calc-time-unit", s_unit), new("sample-pages", QmpType.Int),
            new("mode", s_mode), new("vcpu-dirty-rate", new QmpArray(vcpu), true));
        yield return new("calc-dirty-rate", new(new("calc-time", QmpType.Int), new("calc-time-unit", s_unit, true), new("sample-pages", QmpType.Int, true),
            new("mode", s_mode, true)), QmpObject.Empty, Calc);
        yield return new("query-dirty-rate", new(new QmpMember("calc-time-unit", s_unit, true)), info, Query);
    }

    /// <summary>Ends the running measurement.</summary>
    public async ValueTask DisposeAsync()
    {
        _stop.Set();
        Task running;
        lock (_gate) running = _running;
        await running.ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
        _stop.Dispose();
    }

    private JsonNode? Calc(QmpCall call)
    {
        bool seconds = (call.TryStr("calc-time-unit") ?? "second") == "second";
        long time = call.Int("calc-time"), pages = call.TryInt("sample-pages") ?? DefaultSamplePages;
        string mode = call.TryStr("mode") ?? "page-sampling";
        if (time is < 0 or > MaxTimeMs || (time *= seconds ? 1000 : 1) is < MinTimeMs or > MaxTimeMs)
            throw new QmpErrorException($"Calculation time is out of range [{MinTimeMs}ms, {MaxTimeMs}ms].");
        if (mode != "page-sampling" && call.TryInt("sample-pages") is not null) throw new QmpErrorException("sample-pages is used only in page-sampling mode");
        if (pages is < MinSamplePages or > MaxSamplePages) throw new QmpErrorException($"sample-pages is out of range[{MinSamplePages}, {MaxSamplePages}].");
        if (mode == "dirty-ring") throw new QmpErrorException("mode dirty-ring is not enabled, use other method instead.");
        lock (_gate)
        {
            if (!_running.IsCompleted) throw new QmpErrorException("the dirty rate is already being measured.");
            if (!engine.Status.IsTerminal()) throw new QmpErrorException("the dirty rate cannot be measured while a migration is active");
            var started = new Measurement("measuring", mode, pages, time, DateTimeOffset.UtcNow.ToUnixTimeSeconds(), null);
            _last = started;
            _running = WorkerThread.Run("dirty-rate", () => Measure(started));
        }
        return null;
    }

    private JsonObject Query(QmpCall call)
    {
        bool seconds = (call.TryStr("calc-time-unit") ?? "second") == "second";
        Measurement last;
        lock (_gate) last = _last;
        var answer = new JsonObject
        {
            ["status"] = last.Status, ["sample-pages"] = last.SamplePages, ["mode"] = last.Mode, ["calc-time-unit"] = seconds ? "second" : "millisecond",
            ["start-time"] = last.StartSeconds, ["calc-time"] = seconds ? last.TimeMs / 1000 : last.TimeMs,
        };
        if (last.MiBPerSecond is { } rate) answer["dirty-rate"] = rate;
        return answer;
    }

    private void Measure(Measurement started)
    {
        long? rate = null;
        try
        {
            rate = started.Mode == "dirty-bitmap" ? ByBitmap(started.TimeMs) : BySampling(started.TimeMs, started.SamplePages);
        }
        finally
        {
            lock (_gate) _last = started with { Status = rate is null ? "unstarted" : "measured", MiBPerSecond = rate };
        }
    }

    private long? ByBitmap(long timeMs)
    {
        long start;
        using (vm.Bql.Acquire())
        {
            if (!engine.Status.IsTerminal()) return null;
            vm.Memory.StartDirtyLog();
            start = Environment.TickCount64;
        }
        bool stopped = _stop.Wait((int)timeMs);
        using (vm.Bql.Acquire())
        {
            try
            {
                // A migration that started meanwhile needs the dirty marks: taking them here would lose pages. It changes its status before it starts the log.
                if (stopped || !engine.Status.IsTerminal()) return null;
                long pages = 0;
                foreach (RamBlock block in vm.Memory.Blocks)
                {
                    var marks = new DirtyBitmap(block.PageCount);
                    vm.Memory.HarvestDirtyLog(block, marks);
                    pages += marks.Count();
                }
                return Rate(pages * RamBlock.PageSize, Environment.TickCount64 - start);
            }
            finally
            {
                vm.Memory.StopDirtyLog();
            }
        }
    }

    private long? BySampling(long timeMs, long pagesPerGiB)
    {
        long start = Environment.TickCount64;
        var random = new Random();
        var samples = new List<(RamBlock Block, long Page, ulong Hash)>();
        foreach (RamBlock block in vm.Memory.Blocks)
        {
            long count = Math.Clamp((long)(block.SizeBytes * (UInt128)pagesPerGiB >> 30), 1, block.PageCount);
            for (long i = 0; i < count; i++)
            {
                long page = random.NextInt64(block.PageCount);
                samples.Add((block, page, Hash(block, page)));
            }
        }
        if (_stop.Wait((int)Math.Max(0, timeMs - (Environment.TickCount64 - start)))) return null;
        double dirtyBytes = 0;
        foreach (IGrouping<RamBlock, (RamBlock Block, long Page, ulong Hash)> group in samples.GroupBy(static s => s.Block))
        {
            long dirty = group.LongCount(static s => Hash(s.Block, s.Page) != s.Hash);
            dirtyBytes += (double)dirty / group.LongCount() * group.Key.SizeBytes;
        }
        return Rate(dirtyBytes, Environment.TickCount64 - start);
    }

    private static long Rate(double bytes, long elapsedMs) => (long)(bytes / (1 << 20) * 1000 / Math.Max(1, elapsedMs));

    private static ulong Hash(RamBlock block, long page)
    {
        ReadOnlySpan<byte> bytes = block.ReadOnlySlice((ulong)page * RamBlock.PageSize, RamBlock.PageSize);
        ulong hash = 0x9E3779B97F4A7C15;
        for (; bytes.Length > 0; bytes = bytes[8..])
            hash = BitOperations.RotateLeft((hash ^ BinaryPrimitives.ReadUInt64LittleEndian(bytes)) * 0xD6E8FEB86659FD93, 32);
        return hash;
    }
}
