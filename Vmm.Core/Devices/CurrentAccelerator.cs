namespace Vmm.Core.Devices;

/// <summary>The VM's accelerator, which is made before its devices. BQL: held.</summary>
internal sealed class CurrentAccelerator
{
    /// <summary>The accelerator, or null.</summary>
    public IAccelerator? Value { get; internal set; }
}
