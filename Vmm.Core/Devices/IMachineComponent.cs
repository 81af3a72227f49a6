namespace Vmm.Core.Devices;

/// <summary>When a machine component registers its sections, which fixes their section ids.</summary>
internal enum MachinePhase
{
    /// <summary>After <c>timer</c>, before any device.</summary>
    BeforeDevices,
    /// <summary>After all devices.</summary>
    AfterDevices,
}

/// <summary>A part of every machine that is not a device, e.g. the <c>ram</c> section. Scoped service: one per VM.</summary>
internal interface IMachineComponent : IDisposable
{
    /// <summary>When to call <see cref="Attach"/>.</summary>
    MachinePhase Phase { get; }

    /// <summary>Registers the component's sections. BQL: held.</summary>
    void Attach(IDeviceServices services);
}
