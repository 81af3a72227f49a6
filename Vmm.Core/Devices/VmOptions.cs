using Vmm.Core.Cpr;
using Vmm.Core.Memory;

namespace Vmm.Core.Devices;

/// <summary>Options of a VM.</summary>
public sealed record VmOptions
{
    /// <summary>Name of the VM, or null.</summary>
    public string? Name { get; init; }

    /// <summary>UUID of the VM; all zero for none.</summary>
    public Guid Uuid { get; init; }

    /// <summary>Machine type, which the configuration section carries.</summary>
    public string Machine { get; init; } = "none";

    /// <summary>RAM blocks in the order of their creation.</summary>
    public IReadOnlyList<RamBlockOptions> Memory { get; init; } = [];

    /// <summary>Devices in the order of their creation.</summary>
    public IReadOnlyList<DeviceOptions> Devices { get; init; } = [];

    /// <summary>Name of an accelerator; <c>none</c>; or <c>auto</c>, which means with a kernel the first that works on this host, else none.</summary>
    public string Accelerator { get; init; } = "none";

    /// <summary>Number of vCPUs; only used with an accelerator.</summary>
    public int Cpus { get; init; } = 1;

    /// <summary>Entries of each vCPU's dirty ring; 0 for bitmaps. Only for an accelerator with rings (QEMU: <c>-accel kvm,dirty-ring-size=</c>).</summary>
    public int DirtyRingEntries { get; init; }

    /// <summary>The program that the guest starts with, or null; only with an accelerator.</summary>
    public KernelOptions? Kernel { get; init; }

    /// <summary>True if an accelerator runs the guest.</summary>
    public bool HasCpus => Accelerator != "none" && (Accelerator != "auto" || Kernel is not null);

    /// <summary>True if the VM waits for an incoming migration.</summary>
    public bool IsIncoming { get; init; }

    /// <summary>
    /// True if the VM must always be able to migrate: a device that cannot, or that would block an ordinary migration, is refused (QEMU:
    /// <c>-only-migratable</c>).
    /// </summary>
    public bool OnlyMigratable { get; init; }

    /// <summary>Descriptors from the process that ran this VM before, or null; the VM owns them.</summary>
    public CprIncoming? Cpr { get; init; }

    /// <summary>True if the VM starts without a command (QEMU: no <c>-S</c>).</summary>
    public bool AutoStart { get; init; } = true;
}
