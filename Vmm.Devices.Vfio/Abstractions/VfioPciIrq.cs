namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>Indices of a PCI device's interrupts.</summary>
public static class VfioPciIrq
{
    /// <summary>INTx.</summary>
    public const uint Intx = 0;
    /// <summary>MSI.</summary>
    public const uint Msi = 1;
    /// <summary>MSI-X.</summary>
    public const uint Msix = 2;
    /// <summary>Fatal error.</summary>
    public const uint Err = 3;
    /// <summary>The host asks to give the device back.</summary>
    public const uint Req = 4;
}
