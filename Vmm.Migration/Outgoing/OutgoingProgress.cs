using System.Diagnostics;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Ram;
using Vmm.Migration.Status;

namespace Vmm.Migration.Outgoing;

/// <summary>Figures of one outgoing migration. Written by its thread, read by any.</summary>
internal sealed class OutgoingProgress
{
    private readonly Lock _gate = new();
    private readonly long _startedAt = Stopwatch.GetTimestamp();
    private QemuFileWriter? _writer;
    private RamFigures _ram = RamFigures.None;
    private Func<long>? _multifdBytes;
    private RamStats? _final;
    private double _bandwidth;
    private double _pagesPerSecond;
    private long _windowPages;
    private long _windowAt = Stopwatch.GetTimestamp();
    private long _stopPosition = -1;
    private long _stopAt;
    private double _expectedDowntimeMs = -1, _predictedDowntimeMs = -1;

    /// <summary>Raised with its number after each dirty bitmap synchronisation but the first.</summary>
    internal event Action<long>? Pass;

    /// <summary>Time since the attempt began, ms.</summary>
    internal double ElapsedMs => Stopwatch.GetElapsedTime(_startedAt).TotalMilliseconds;

    internal long SetupMs { get; set; }

    internal long TotalMs { get; set; }

    internal double DrainMs { get; set; }

    internal long PendingBytes { get; set; }

    /// <summary>Why the VM has not been stopped yet.</summary>
    internal SwitchoverWait WaitsFor { get; set; } = SwitchoverWait.Bandwidth;

    internal DowntimeReport? Downtime { get; set; }

    internal MigrationError? Error { get; set; }

    /// <summary>Connects the figures to the attempt's stream and channels.</summary>
    internal void Attach(OutgoingLink link)
    {
        lock (_gate) (_writer, _ram, _multifdBytes) = (link.File, link.Ram, link.Sender is { } sender ? () => sender.Sent.Bytes : null);
    }

    internal void OnPass(long syncCount) => Pass?.Invoke(syncCount);

    /// <summary>Takes what a synchronisation found and led to.</summary>
    /// <param name="leftBytes">Everything that is left.</param>
    /// <param name="switchoverBytesPerSecond">Rate expected after the stop; 0 when it is not known.</param>
    /// <param name="syncMs">Time of the synchronisation, which the downtime will have once more.</param>
    /// <param name="waitsFor">Why the VM is not stopped.</param>
    internal void OnDecision(long leftBytes, double switchoverBytesPerSecond, double syncMs, SwitchoverWait waitsFor)
    {
        lock (_gate)
        {
            WaitsFor = waitsFor;
            if (switchoverBytesPerSecond > 0) _predictedDowntimeMs = leftBytes / switchoverBytesPerSecond * 1000 + syncMs;
        }
    }

    internal void OnStop(long position)
    {
        lock (_gate)
        {
            _stopPosition = position;
            _stopAt = Stopwatch.GetTimestamp();
        }
    }

    internal void OnWindow(double bytesPerSecond, RamFigures ram, double switchoverBytesPerSecond)
    {
        lock (_gate)
        {
            long pages = ram.NormalPages + ram.ZeroPages + (ram.Xbzrle?.Pages ?? 0);
            double seconds = Stopwatch.GetElapsedTime(_windowAt).TotalSeconds;
            _pagesPerSecond = seconds > 0 ? (pages - _windowPages) / seconds : 0;
            _windowPages = pages;
            _windowAt = Stopwatch.GetTimestamp();
            _bandwidth = bytesPerSecond;
            if (switchoverBytesPerSecond > 0) _expectedDowntimeMs = PendingBytes / switchoverBytesPerSecond * 1000;
        }
    }

    /// <summary>Keeps the final figures, because the attempt's objects go away.</summary>
    internal void Freeze()
    {
        RamStats stats = Stats();
        double seconds = Math.Max(TotalMs - SetupMs, 1) / 1000.0;
        lock (_gate)
            _final = stats with { RemainingBytes = 0, DirtyPagesRate = 0, Mbps = stats.TransferredBytes * 8 / seconds / 1e6 };
    }

    internal MigrationInfo Info(MigrationStatus status, MigrationParameters parameters)
    {
        bool live = status is MigrationStatus.Active or MigrationStatus.PreSwitchover or MigrationStatus.Device or MigrationStatus.Cancelling or MigrationStatus.Failing;
        bool done = status == MigrationStatus.Completed;
        lock (_gate)
        {
            return new MigrationInfo
            {
                Status = status,
                TotalTimeMs = done || status.IsTerminal() ? TotalMs : (long)Stopwatch.GetElapsedTime(_startedAt).TotalMilliseconds,
                SetupTimeMs = SetupMs,
                ExpectedDowntimeMs = live && _stopPosition < 0 ? (_expectedDowntimeMs < 0 ? (long)parameters.DowntimeLimitMs : (long)_expectedDowntimeMs) : null,
                DowntimeMs = Downtime?.TotalMs ?? (live && _stopPosition >= 0 ? Stopwatch.GetElapsedTime(_stopAt).TotalMilliseconds : null),
                PredictedDowntimeMs = live && _stopPosition < 0 && _predictedDowntimeMs >= 0 ? _predictedDowntimeMs : null,
                SwitchoverWait = status == MigrationStatus.Active && _stopPosition < 0 ? WaitsFor.ToWireName() : null,
                RemainingBytes = live ? Math.Max(PendingBytes, _ram.RemainingBytes) : null,
                Ram = live || done ? _final ?? Stats() : null,
                Xbzrle = live || done ? Xbzrle(_ram.Xbzrle) : null,
                Downtime = Downtime,
                Error = status is MigrationStatus.Failed or MigrationStatus.Failing ? Error : null,
            };
        }
    }

    private static XbzrleStats? Xbzrle(XbzrleFigures? figures) => figures is null ? null : new XbzrleStats
    {
        CacheSizeBytes = figures.CacheSizeBytes, Bytes = figures.Bytes, Pages = figures.Pages, CacheMisses = figures.Misses, CacheMissRate = figures.Rates.Miss,
        EncodingRate = figures.Rates.Encoding, Overflows = figures.Overflows,
    };

    private RamStats Stats()
    {
        lock (_gate)
        {
            long sent = _writer?.Position ?? 0;
            long precopy = _stopPosition < 0 ? sent : _stopPosition;
            return new RamStats
            {
                TransferredBytes = sent,
                RemainingBytes = _ram.RemainingBytes,
                TotalBytes = _ram.TotalBytes,
                DuplicatePages = _ram.ZeroPages,
                NormalPages = _ram.NormalPages,
                DirtyPagesRate = _ram.DirtyPagesRate,
                Mbps = _bandwidth * 8 / 1e6,
                PagesPerSecond = (long)_pagesPerSecond,
                DirtySyncCount = _ram.SyncCount,
                PrecopyBytes = precopy,
                DowntimeBytes = sent - precopy,
                MultifdBytes = _multifdBytes?.Invoke() ?? 0,
            };
        }
    }
}
