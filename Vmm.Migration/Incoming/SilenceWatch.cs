using System.Diagnostics;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Migration.Attempts;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Incoming;

/// <summary>
/// Ends a load whose source sends nothing for too long (STREAM.md, deadlines). Only time in which the load waits for bytes counts, not time in which a device
/// loads its state. A QEMU source may rightly be silent while its guest runs; only the kernel's keep-alive ends a dead connection to it then.
/// </summary>
internal sealed class SilenceWatch : IDisposable
{
    private static readonly TimeSpan s_interval = TimeSpan.FromMilliseconds(100);

    private readonly MigrationContext _context;
    private readonly SocketChannel _main;
    private readonly IReadOnlyList<IMigrationChannel> _data;
    private readonly Action<Exception> _end;
    private readonly Timer _timer;
    private readonly Lock _gate = new();
    private long _received = -1;
    private long _receivedAt = Stopwatch.GetTimestamp();

    /// <param name="context">Has the deadlines.</param>
    /// <param name="main">The main channel.</param>
    /// <param name="data">The channels of multifd.</param>
    /// <param name="end">Called with the error, on a thread of the pool.</param>
    internal SilenceWatch(MigrationContext context, SocketChannel main, IReadOnlyList<IMigrationChannel> data, Action<Exception> end)
    {
        (_context, _main, _data, _end) = (context, main, data, end);
        _timer = new Timer(_ => Look(), null, s_interval, s_interval);
    }

    /// <summary>Says whether the load waits for the channels of multifd.</summary>
    internal Func<bool> WaitsForData { get; set; } = static () => false;

    /// <summary>What the load waits for now.</summary>
    internal Waiting For { get; set; } = Waiting.Header;

    internal enum Waiting
    {
        /// <summary>Header and first commands, which every source sends at once.</summary>
        Header,
        /// <summary>A source that sends at least a PING every two seconds.</summary>
        Live,
        /// <summary>Any source whose guest is stopped; it may have to wait for its own devices.</summary>
        Stopped,
        /// <summary>A source that may be silent while its guest runs.</summary>
        Other,
    }

    /// <summary>Ends the watch and waits for a look that is going on.</summary>
    public void Dispose() => _timer.DisposeAsync().AsTask().GetAwaiter().GetResult();

    private void Look()
    {
        if (!_gate.TryEnter()) return;
        try
        {
            long received = _main.ReceivedBytes;
            foreach (IMigrationChannel channel in _data) received += (channel as SocketChannel)?.ReceivedBytes ?? 0;
            if (received != _received || !(_main.IsReading || WaitsForData())) (_received, _receivedAt) = (received, Stopwatch.GetTimestamp());
            MigrationParameters limits = _context.Parameters.Current;
            (ulong limitMs, string parameter) = For switch
            {
                Waiting.Header => (limits.SetupTimeoutMs, "x-setup-timeout"),
                Waiting.Live => (limits.ProgressTimeoutMs, "x-progress-timeout"),
                Waiting.Stopped => (limits.FinalWordTimeoutMs, "x-final-word-timeout"),
                _ => (ulong.MaxValue, string.Empty),
            };
            if (Stopwatch.GetElapsedTime(_receivedAt).TotalMilliseconds <= limitMs) return;
            _end(new ChannelException($"{_main.Name}: the source has sent nothing for {limitMs / 1000.0:0.#} s", Errno.ETIMEDOUT) { Hint = $"parameter {parameter} sets this deadline" });
            _receivedAt = Stopwatch.GetTimestamp();
        }
        finally
        {
            _gate.Exit();
        }
    }
}
