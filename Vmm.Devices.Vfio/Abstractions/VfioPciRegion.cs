namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>Indices of a PCI device's regions.</summary>
public static class VfioPciRegion
{
    /// <summary>First BAR; the other five follow.</summary>
    public const uint Bar0 = 0;
    /// <summary>Expansion ROM.</summary>
    public const uint Rom = 6;
    /// <summary>Configuration space.</summary>
    public const uint Config = 7;
    /// <summary>VGA.</summary>
    public const uint Vga = 8;
    /// <summary>First device-specific region; its TYPE capability says what it is. In vfio-user it is the v1 migration region.</summary>
    public const uint FirstDeviceSpecific = 9;
    /// <summary>TYPE capability of a v1 migration region.</summary>
    public const uint MigrationType = 3;
    /// <summary>Its subtype.</summary>
    public const uint MigrationSubtype = 1;
}
