using Microsoft.Extensions.Logging;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>What the server gives to the device it hosts. Any thread.</summary>
public sealed class VfioUserHost
{
    private readonly Func<VfioDeviceState> _state;

    internal VfioUserHost(DmaMap dma, VfioUserIrqs irqs, Func<VfioDeviceState> state, ILogger logger) => (Dma, Irqs, _state, Logger) = (dma, irqs, state, logger);

    /// <summary>The client's memory.</summary>
    public DmaMap Dma { get; }

    /// <summary>The device's interrupts.</summary>
    public VfioUserIrqs Irqs { get; }

    /// <summary>Logger for the device's own messages.</summary>
    public ILogger Logger { get; }

    /// <summary>The migration state, which only the server changes (vfio-user S-57). Any thread.</summary>
    public VfioDeviceState State => _state();
}
