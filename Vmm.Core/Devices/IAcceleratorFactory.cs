using Vmm.Core.Errors;

namespace Vmm.Core.Devices;

/// <summary>Makes accelerators of one kind.</summary>
internal interface IAcceleratorFactory
{
    /// <summary>Its name, as in <c>--accel NAME</c>.</summary>
    string Name { get; }

    /// <summary>Whether it can be used on this host; asked for <c>auto</c>.</summary>
    /// <returns>Null, or why not.</returns>
    VmmException? Probe();

    /// <summary>Makes an accelerator for a VM whose RAM is there and whose devices are not. BQL: held. Nothing is left behind on failure.</summary>
    /// <param name="options">The VM's options.</param>
    /// <param name="services">The VM's services.</param>
    /// <returns>The accelerator, owned by the VM.</returns>
    IAccelerator Create(VmOptions options, IDeviceServices services);
}
