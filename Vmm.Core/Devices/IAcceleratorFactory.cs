using Vmm.Core.Errors;

namespace Vmm.Core.Devices;

/// <summary>Makes accelerators of one kind.</summary>
internal interface IAcceleratorFactory
{
    /// <summary>Its name, as in <c>--accel NAME</c>.</summary>
    string Name { get; }

    /// <summary>Tells whether this host can use the accelerator; <c>auto</c> calls it.</summary>
    /// <returns>Null if it can, else the reason.</returns>
    VmmException? Probe();

    /// <summary>Makes an accelerator for a VM that has its RAM but no devices yet. A failure leaves nothing behind. BQL: held.</summary>
    /// <returns>The accelerator; the VM owns it.</returns>
    IAccelerator Create(VmOptions options, IDeviceServices services);
}
