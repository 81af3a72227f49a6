namespace Vmm.Core.SaveVm;

/// <summary>
/// Variants of the framing that QEMU keeps in properties of its <c>migration</c> object and of machine types (stream 16). The defaults write a stream that
/// every QEMU from 7.2 to 11.1 loads. Both ends must agree on configuration and footers.
/// </summary>
internal sealed record MigrationCompat
{
    /// <summary><c>migration.send-configuration</c>.</summary>
    public bool SendConfiguration { get; init; } = true;

    /// <summary><c>migration.send-section-footer</c>.</summary>
    public bool SendSectionFooter { get; init; } = true;

    /// <summary><c>migration.store-global-state</c>.</summary>
    public bool StoreGlobalState { get; init; } = true;

    /// <summary>
    /// <c>migration.send-switchover-start</c>. Off by default, because a QEMU before 10.0 ends with an error when it reads the command and later ones do not need
    /// it (stream 17.2).
    /// </summary>
    public bool SendSwitchoverStart { get; init; }

    /// <summary><c>suppress-vmdesc</c>.</summary>
    public bool SuppressVmDesc { get; init; }

    /// <summary>
    /// With capability switchover-ack, one acknowledgement stands for all devices together, as with machine types up to 11.0 (vfio-migration 3.6;
    /// QEMU: <c>switchover-ack-legacy</c>). Both ends must agree.
    /// </summary>
    public bool LegacySwitchoverAck { get; init; }

    /// <summary>VMDESC and <c>globalstate</c> have the form of QEMU before 9.0 (stream 10.2, 16).</summary>
    public bool LegacyDescriptions { get; init; }
}
