using System.Collections.Concurrent;
using System.Runtime.InteropServices;
using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Logging;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>
/// A device of the host's kernel, by its device descriptor: from a group or a character device, or inherited from the process before a
/// restart (vfio-migration 1.4 to 1.7, 1.11). The kernel serialises requests, so this class needs no lock; it only caches answers.
/// </summary>
internal sealed partial class KernelVfioDeviceIo : IVfioDeviceIo
{
    private readonly IVfioKernel _kernel;
    private readonly OwnedFd _fd;
    private readonly IDisposable? _membership;
    private readonly ILogger _logger;
    private readonly ConcurrentDictionary<uint, (VfioRegionInfo Info, ulong FileOffset)> _regions = new();
    private readonly ConcurrentDictionary<uint, VfioIrqInfo> _irqs = new();

    /// <summary>Reads the device's info and nothing else, because the descriptor may come from the process before a restart.</summary>
    /// <param name="name">PCI address or UUID, for logs and errors.</param>
    /// <param name="fd">An open and bound device descriptor; owned from here on, also after a failure.</param>
    /// <param name="kernel">System calls.</param>
    /// <param name="container">Where its DMA is mapped.</param>
    /// <param name="logger">Logger.</param>
    /// <param name="membership">Keeps the device in its container; disposed with this object, also when this throws.</param>
    /// <exception cref="VfioException">The descriptor is not a device's.</exception>
    internal KernelVfioDeviceIo(string name, OwnedFd fd, IVfioKernel kernel, IVfioContainer container, ILogger logger, IDisposable? membership)
    {
        (Name, _fd, _kernel, Container, _logger, _membership) = (name, fd, kernel, container, logger, membership);
        try
        {
            var info = new VfioUapi.DeviceInfo { Argsz = (uint)Marshal.SizeOf<VfioUapi.DeviceInfo>() };
            Errno errno = kernel.Call(fd, VfioUapi.VFIO_DEVICE_GET_INFO, ref info);
            if (errno != Errno.None) throw Failed("cannot read the device's info", errno);
            Info = new VfioDeviceInfo((info.Flags & VfioUapi.VFIO_DEVICE_FLAGS_RESET) != 0, (info.Flags & VfioUapi.VFIO_DEVICE_FLAGS_PCI) != 0, info.NumRegions, info.NumIrqs);
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    /// <remarks>Never raised: a device of the host does not vanish while its descriptor is open.</remarks>
    public event Action<VmmException>? Lost
    {
        add { }
        remove { }
    }

    public string Name { get; }

    public VfioDeviceInfo Info { get; }

    public IVfioContainer Container { get; }

    /// <summary>Its descriptor, for a hand-over to another process.</summary>
    internal OwnedFd Fd => _fd;

    /// <summary>Migration state in which the device was found (a device that was not RUNNING has been reset since); null when it has no such states.</summary>
    internal VfioDeviceState? StateAtOpen { get; private set; }

    /// <summary>Opens the device that <c>host=</c> or <c>sysfsdev=</c> names, through iommufd or a group as <c>iommufd=on|off|auto</c> says. BQL: held.</summary>
    /// <returns>The device, RUNNING when it has migration states, its DMA mapped.</returns>
    /// <exception cref="ConfigurationException">An option is refused.</exception>
    /// <exception cref="VfioException">The host or its kernel refused; the message says what and the hint what to do.</exception>
    internal static KernelVfioDeviceIo Open(DeviceOptions options, IDeviceServices services)
    {
        var containers = services.Scope.GetRequiredService<VfioContainers>();
        return containers.Open(VfioDeviceChoice.From(options, containers.Paths), services.CprFds);
    }

    /// <summary>Resets a device that is not RUNNING: some drivers keep the migration state in which an earlier user closed the device.</summary>
    /// <exception cref="VfioException">The reset was refused.</exception>
    internal void LeaveStaleState()
    {
        if (GetMigrationState(out VfioDeviceState found) != Errno.None) return;
        StateAtOpen = found;
        if (found == VfioDeviceState.Running) return;
        VfioKernelLog.StaleState(_logger, Name, found);
        Errno errno = Reset();
        if (errno == Errno.None) errno = GetMigrationState(out found);
        if (errno == Errno.None && found != VfioDeviceState.Running) errno = Errno.EIO;
        if (errno != Errno.None) throw Failed($"an earlier user left the device in migration state {StateAtOpen} and its reset failed", errno,
            "unbind the device from its driver and bind it again; remove and create a mediated device again");
    }

    public VfioRegionInfo GetRegionInfo(uint index) => Region(index).Info;

    public VfioIrqInfo GetIrqInfo(uint index)
    {
        if (index >= Info.IrqCount) return default;
        return _irqs.GetOrAdd(index, static (i, self) =>
        {
            var info = new VfioUapi.IrqInfo { Argsz = (uint)Marshal.SizeOf<VfioUapi.IrqInfo>(), Index = i };
            Errno errno = self._kernel.Call(self._fd, VfioUapi.VFIO_DEVICE_GET_IRQ_INFO, ref info);
            return errno switch
            {
                Errno.None => new VfioIrqInfo((VfioIrqInfoFlags)info.Flags & (VfioIrqInfoFlags)0xf, info.Count),
                Errno.EINVAL => default,
                _ => throw self.Failed($"cannot read the info of interrupt {i}", errno),
            };
        }, this);
    }

    public Errno Reset()
    {
        if (IsUntouchable) return Errno.None;
        _kernel.Ioctl(_fd, VfioUapi.VFIO_DEVICE_RESET, 0, out Errno errno);
        return errno;
    }

    /// <inheritdoc/>
    /// <remarks>Nothing to do: a kernel device sees the guest's command register itself.</remarks>
    public void SetBusMaster(bool enabled)
    {
    }

    public MappedRegion? MapArea(uint index, VfioRegionArea area)
    {
        (VfioRegionInfo info, ulong fileOffset) = Region(index);
        if (!info.Areas.Contains(area) || !info.Flags.HasFlag(VfioRegionFlags.Read)) return null;
        try
        {
            return _kernel.Map(_fd, area.SizeBytes, (long)(fileOffset + area.OffsetBytes), $"{Name} region {index}", info.Flags.HasFlag(VfioRegionFlags.Write));
        }
        catch (ChannelException e)
        {
            VfioKernelLog.CannotMap(_logger, Name, index, area.OffsetBytes, area.SizeBytes, e.Errno);
            return null;
        }
    }

    public Errno RegionRead(uint index, ulong offset, Span<byte> destination)
    {
        if (!TryLocate(index, offset, destination.Length, out long at)) return Errno.EINVAL;
        while (destination.Length > 0)
        {
            int width = Width(offset, destination.Length);
            int n = _kernel.PRead(_fd, destination[..width], at, out Errno errno);
            if (n != width) return n < 0 ? errno : Errno.EINVAL;
            destination = destination[width..];
            (at, offset) = (at + width, offset + (ulong)width);
        }
        return Errno.None;
    }

    public Errno RegionWrite(uint index, ulong offset, ReadOnlySpan<byte> source, bool posted = false)
    {
        if (IsUntouchable) return Errno.None;
        if (!TryLocate(index, offset, source.Length, out long at)) return Errno.EINVAL;
        while (source.Length > 0)
        {
            int width = Width(offset, source.Length);
            int n = _kernel.PWrite(_fd, source[..width], at, out Errno errno);
            if (n != width) return n < 0 ? errno : Errno.EINVAL;
            source = source[width..];
            (at, offset) = (at + width, offset + (ulong)width);
        }
        return Errno.None;
    }

    public void Dispose()
    {
        _entered?.Dispose();
        // The device must be closed before its group can leave the container.
        _fd.Dispose();
        _membership?.Dispose();
    }

    /// <summary>The widest access that the offset's alignment and the length allow (vfio-migration 5.1).</summary>
    private static int Width(ulong offset, int length)
    {
        int width = 8;
        while (width > length || offset % (ulong)width != 0) width /= 2;
        return width;
    }

    private bool TryLocate(uint index, ulong offset, int length, out long at)
    {
        (VfioRegionInfo info, ulong fileOffset) = Region(index);
        at = (long)(fileOffset + offset);
        return offset <= info.SizeBytes && (ulong)length <= info.SizeBytes - offset;
    }

    private (VfioRegionInfo Info, ulong FileOffset) Region(uint index)
    {
        if (index >= Info.RegionCount) return (new VfioRegionInfo { Index = index }, 0);
        return _regions.GetOrAdd(index, static (i, self) => self.ReadRegion(i), this);
    }

    private (VfioRegionInfo Info, ulong FileOffset) ReadRegion(uint index)
    {
        var region = new VfioUapi.RegionInfo { Index = index };
        Errno errno = _kernel.CallForInfo(_fd, VfioUapi.VFIO_DEVICE_GET_REGION_INFO, ref region, out byte[] bytes);
        if (errno == Errno.EINVAL) return (new VfioRegionInfo { Index = index }, 0);
        if (errno != Errno.None) throw Failed($"cannot read the info of region {index}", errno);
        if (region.Size > long.MaxValue - Math.Min(region.Offset, long.MaxValue)) throw Failed($"region {index} ends beyond the largest file offset", Errno.EPROTO);
        return (new VfioCapabilities(bytes, $"{Name}: region {index}").Region(region), region.Offset);
    }

    private VfioException Failed(string what, Errno errno, string? hint = null) => new($"{Name}: {what}: {Posix.Describe(errno)}", errno) { Hint = hint };
}
