namespace Vmm.Core.Devices;

/// <summary>Holds the VM's accelerator for its devices; the accelerator is made before them. BQL: held.</summary>
internal sealed class CurrentAccelerator
{
    /// <summary>The accelerator, or null.</summary>
    public IAccelerator? Value { get; internal set; }
}
