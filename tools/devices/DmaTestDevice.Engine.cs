using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using static Vmm.Tools.Devices.DmaTestRegisters;

namespace Vmm.Tools.Devices;
using Nito.AsyncEx.Synchronous;

public sealed partial class DmaTestDevice
{
    private const int RetryMs = 5;

    private Task _engine = Task.CompletedTask;
    private bool _ends, _isBusy, _isStopped, _retries;
    private int _quiesced;
    private TaskCompletionSource<Errno>? _becomesQuiet;
    private long _paceStart;
    private ulong _paceBytes;

    private ulong Slots => _length / _block;

    private bool CanWrite => _quiesced == 0 && !_isStopped && (_control & ControlRun) != 0 && Slots > 0;

    /// <summary>Completes when the engine is quiet; a busy engine first waits for the client's answer to its DMA message.</summary>
    public ValueTask<Errno> Quiesce()
    {
        lock (_gate)
        {
            _quiesced++;
            if (!_isBusy) return ValueTask.FromResult(Errno.None);
            _becomesQuiet ??= new TaskCompletionSource<Errno>(TaskCreationOptions.RunContinuationsAsynchronously);
            return new ValueTask<Errno>(_becomesQuiet.Task);
        }
    }

    public void Unquiesce()
    {
        lock (_gate)
        {
            _quiesced--;
            Monitor.PulseAll(_gate);
        }
    }

    private void StartEngine() => _engine = WorkerThread.Run("dma-test", RunEngine);

    private void StopEngine()
    {
        lock (_gate)
        {
            _ends = true;
            Monitor.PulseAll(_gate);
        }
        _engine.WaitAndUnwrapException();
    }

    private void RestartPace() => (_paceStart, _paceBytes) = (Stopwatch.GetTimestamp(), 0);

    private void RunEngine()
    {
        byte[] block = new byte[65536];
        while (true)
        {
            ulong sequence, address;
            int length;
            lock (_gate)
            {
                if (_ends) return;
                int wait = CanWrite ? PaceMs() : Timeout.Infinite;
                if (wait != 0)
                {
                    Monitor.Wait(_gate, wait);
                    continue;
                }
                (_isBusy, sequence, length) = (true, _sequence, (int)_block);
                address = _base + (sequence % Slots * _block);
            }
            DmaTestPattern.Fill(sequence, block.AsSpan(0, length));
            Errno errno = _host.Dma.Write(address, block.AsSpan(0, length));
            lock (_gate) Written(errno, length);
        }
    }

    /// <summary>Returns the milliseconds until the rate allows the next block.</summary>
    private int PaceMs()
    {
        if (_retries)
        {
            _retries = false;
            return RetryMs;
        }
        if (_rate == 0) return 0;
        double due = _paceBytes * 1000.0 / _rate, now = Stopwatch.GetElapsedTime(_paceStart).TotalMilliseconds;
        return due <= now ? 0 : (int)Math.Clamp(Math.Ceiling(due - now), 1, 1000);
    }

    private void Written(Errno errno, int length)
    {
        _isBusy = false;
        _becomesQuiet?.SetResult(Errno.None);
        _becomesQuiet = null;
        switch (errno)
        {
            case Errno.None:
                _sequence++;
                _status &= ~StatusStalled;
                _paceBytes += (uint)length;
                if (_interruptEvery != 0 && _sequence % _interruptEvery == 0) Interrupt();
                break;
            // Memory not mapped, bus mastering off or no client: retry, because a driver may need time to set the device up.
            case Errno.EFAULT or Errno.ENODEV or Errno.ENOTCONN or Errno.EAGAIN:
                (_status, _error, _retries) = (_status | StatusStalled, (uint)errno, true);
                break;
            default:
                (_status, _error) = (_status | StatusError, (uint)errno);
                _control = 0;
                break;
        }
    }

    private void Interrupt()
    {
        _interrupts++;
        if (_config.IsMsixEnabled)
        {
            _host.Irqs.Raise(VfioPciIrq.Msix, 0);
        }
        else if (!_config.IsIntxDisabled)
        {
            _status |= StatusInterrupt;
            _host.Irqs.SetIntx(true);
        }
    }
}
