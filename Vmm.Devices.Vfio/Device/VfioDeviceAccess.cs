using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Device;

/// <summary>
/// A device's io, as the code for the guest uses it: a failure never throws but is logged, at a bounded rate, and a device that is gone gets no
/// more requests. Region accesses from any thread; interrupts with the BQL held.
/// </summary>
internal sealed class VfioDeviceAccess : IDisposable
{
    private static readonly TimeSpan s_logInterval = TimeSpan.FromSeconds(10);

    private readonly RateLimit _reads = new(TimeProvider.System, s_logInterval), _writes = new(TimeProvider.System, s_logInterval);
    private readonly RateLimit _irqs = new(TimeProvider.System, s_logInterval);
    private volatile bool _lost;

    private volatile bool _left;

    internal VfioDeviceAccess(string id, IVfioDeviceIo io, ILogger logger)
    {
        (Id, Io, Logger) = (id, io, logger);
        io.Lost += OnLost;
    }

    /// <summary>Raised once for each loss of the device, on any thread, no lock held.</summary>
    internal event Action<VmmException>? Lost;

    internal string Id { get; }

    internal IVfioDeviceIo Io { get; }

    internal ILogger Logger { get; }

    /// <summary>The device is gone, until <see cref="Return"/>.</summary>
    internal bool IsLost => _lost;

    /// <summary>The device belongs to another process: it gets no more requests, and no message says so.</summary>
    internal void Leave() => _left = _lost = true;

    /// <summary>Uses the device that has taken the lost one's place.</summary>
    internal void Return() => _lost = _left;

    public void Dispose() => Io.Lost -= OnLost;

    internal bool Read(uint region, ulong offset, Span<byte> destination)
    {
        if (_lost) return false;
        Errno errno;
        try
        {
            errno = Io.RegionRead(region, offset, destination);
        }
        catch (VmmException e)
        {
            errno = e.Errno;
        }
        if (errno == Errno.None) return true;
        if (!_lost && _reads.TryPass(out long dropped)) VfioLog.RegionReadFailed(Logger, Id, region, offset, destination.Length, errno, dropped);
        return false;
    }

    internal bool Write(uint region, ulong offset, ReadOnlySpan<byte> source, bool posted = false)
    {
        if (_lost) return false;
        Errno errno;
        try
        {
            errno = Io.RegionWrite(region, offset, source, posted);
        }
        catch (VmmException e)
        {
            errno = e.Errno;
        }
        if (errno == Errno.None) return true;
        if (!_lost && _writes.TryPass(out long dropped)) VfioLog.RegionWriteFailed(Logger, Id, region, offset, source.Length, errno, dropped);
        return false;
    }

    internal Errno SetIrqs(VfioIrqSetFlags flags, uint index, uint start, uint count, params ReadOnlySpan<OwnedFd?> eventFds)
    {
        Errno errno = TrySetIrqs(flags, index, start, count, eventFds);
        if (errno != Errno.None && !_lost && _irqs.TryPass(out long dropped))
            VfioLog.SetIrqsFailed(Logger, Id, new VfioIrqSet(flags, index, start, count).ToString(), errno, dropped);
        return errno;
    }

    /// <summary>Like <see cref="SetIrqs"/>, but a refusal is not logged, because not every device can do this.</summary>
    internal Errno TrySetIrqs(VfioIrqSetFlags flags, uint index, uint start, uint count, params ReadOnlySpan<OwnedFd?> eventFds)
    {
        if (_lost) return Errno.ENODEV;
        try
        {
            return Io.SetIrqs(new VfioIrqSet(flags, index, start, count), [], eventFds);
        }
        catch (VmmException e)
        {
            return e.Errno;
        }
    }

    internal void SetBusMaster(bool enabled)
    {
        if (_lost) return;
        try
        {
            Io.SetBusMaster(enabled);
        }
        catch (VmmException e)
        {
            if (!_lost) VfioLog.BusMasterFailed(Logger, Id, enabled, e.Message);
        }
    }

    /// <summary>Resets the device.</summary>
    /// <returns>False when it was refused.</returns>
    internal bool Reset()
    {
        if (_lost) return false;
        Errno errno;
        try
        {
            errno = Io.Reset();
        }
        catch (VmmException e)
        {
            errno = e.Errno;
        }
        // The flag is advisory: devices without it are tried too, and their refusal is not logged (vfio-migration 1.4).
        if (errno != Errno.None && !_lost && Io.Info.SupportsReset) VfioLog.ResetFailed(Logger, Id, errno);
        return errno == Errno.None;
    }

    private void OnLost(VmmException reason)
    {
        // A late word about a device that has been replaced has no reason any more.
        if (_lost || Io.LostReason is null) return;
        _lost = true;
        VfioLog.DeviceLost(Logger, Id, VmmException.Describe(reason));
        Lost?.Invoke(reason);
    }
}
