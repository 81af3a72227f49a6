namespace Vmm.Core.Devices;

/// <summary>When a machine component attaches, which fixes its section id.</summary>
internal enum MachinePhase
{
    /// <summary>After <c>timer</c>, before any device.</summary>
    BeforeDevices,
    /// <summary>After all devices.</summary>
    AfterDevices,
}

/// <summary>A part of every machine that is not a device, e.g. the <c>ram</c> section. Scoped: one per VM.</summary>
internal interface IMachineComponent : IDisposable
{
    /// <summary>When to attach.</summary>
    MachinePhase Phase { get; }

    /// <summary>Registers the component's sections. BQL: held.</summary>
    /// <param name="services">The VM's services.</param>
    void Attach(IDeviceServices services);
}
