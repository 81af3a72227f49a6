using Vmm.Core.Cpr;
using Vmm.Core.Memory;

namespace Vmm.Core.Devices;

/// <summary>What to make a VM from.</summary>
public sealed record VmOptions
{
    /// <summary>Name, or null.</summary>
    public string? Name { get; init; }

    /// <summary>UUID; all zero when not set.</summary>
    public Guid Uuid { get; init; }

    /// <summary>Machine type in the configuration section.</summary>
    public string Machine { get; init; } = "none";

    /// <summary>RAM blocks, in order.</summary>
    public IReadOnlyList<RamBlockOptions> Memory { get; init; } = [];

    /// <summary>Devices, in order.</summary>
    public IReadOnlyList<DeviceOptions> Devices { get; init; } = [];

    /// <summary>What runs the guest: <c>none</c>, an accelerator's name, or <c>auto</c>: for a kernel the first that works on this host, else none.</summary>
    public string Accelerator { get; init; } = "none";

    /// <summary>Number of vCPUs; only with an accelerator.</summary>
    public int Cpus { get; init; } = 1;

    /// <summary>Entries of each vCPU's ring of written pages; 0 for bitmaps. Only for accelerators that have rings (QEMU: <c>-accel kvm,dirty-ring-size=</c>).</summary>
    public int DirtyRingEntries { get; init; }

    /// <summary>The program to start with, or null; only with an accelerator.</summary>
    public KernelOptions? Kernel { get; init; }

    /// <summary>Whether an accelerator runs the guest, whichever it is.</summary>
    public bool HasCpus => Accelerator != "none" && (Accelerator != "auto" || Kernel is not null);

    /// <summary>Whether the VM waits for an incoming migration.</summary>
    public bool IsIncoming { get; init; }

    /// <summary>Descriptors from the process that ran this VM before, or null; owned by the VM from here on.</summary>
    public CprIncoming? Cpr { get; init; }

    /// <summary>Whether the VM starts by itself (QEMU: no <c>-S</c>).</summary>
    public bool AutoStart { get; init; } = true;
}
