using Vmm.Core.Errors;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>The CPU that a guest sees: the CPUID that KVM supports on this host, with the number of each vCPU.</summary>
internal static class KvmCpuid
{
    private const uint Hypervisor = 1u << 31, TscDeadline = 1u << 24, HyperThreading = 1u << 28, TopologyLeaf = 0xb;

    /// <summary>Leaves with feature bits, XCR0 included. A guest that has seen a feature must find it on every host.</summary>
    private static readonly (uint Function, uint Index, string Register, Func<CpuidEntry2, uint> Bits)[] s_features =
    [
        (1, 0, "ecx", static e => e.Ecx), (1, 0, "edx", static e => e.Edx),
        (7, 0, "ebx", static e => e.Ebx), (7, 0, "ecx", static e => e.Ecx), (7, 0, "edx", static e => e.Edx),
        (7, 1, "eax", static e => e.Eax), (7, 1, "edx", static e => e.Edx),
        (0xd, 0, "eax", static e => e.Eax), (0xd, 0, "edx", static e => e.Edx), (0xd, 1, "eax", static e => e.Eax),
        (0x80000001, 0, "ecx", static e => e.Ecx), (0x80000001, 0, "edx", static e => e.Edx),
        (0x80000007, 0, "edx", static e => e.Edx), (0x80000008, 0, "ebx", static e => e.Ebx), (0x40000001, 0, "eax", static e => e.Eax),
    ];

    /// <summary>Makes the CPUID of a vCPU.</summary>
    /// <param name="index">Number of the vCPU, also its APIC id.</param>
    /// <param name="cpus">Number of vCPUs. They are cores of one package, because kernels treat the TSCs of several packages as unsynchronised.</param>
    /// <param name="system">Supplies the CPUID that the host supports.</param>
    internal static CpuidEntry2[] For(int index, int cpus, KvmSystem system)
    {
        int bits = cpus <= 1 ? 0 : 32 - int.LeadingZeroCount(cpus - 1);
        CpuidEntry2[] entries = [.. system.SupportedCpuid.Where(static e => e.Function != TopologyLeaf), .. Topology(index, cpus, bits)];
        for (int i = 0; i < entries.Length; i++)
        {
            ref CpuidEntry2 e = ref entries[i];
            if (e.Function == 1)
            {
                e.Ebx = (e.Ebx & 0x0000ffff) | (uint)index << 24 | (1u << bits) << 16;
                e.Edx = cpus > 1 ? e.Edx | HyperThreading : e.Edx & ~HyperThreading;
                e.Ecx |= Hypervisor;
                if (system.Extension(KVM_CAP_TSC_DEADLINE_TIMER) > 0) e.Ecx |= TscDeadline;
            }
            else if (e.Function == 4 && (e.Eax & 0x1f) != 0) e.Eax = (e.Eax & 0x03ffffff) | ((1u << bits) - 1) << 26;
            else if (e.Function == 0x80000008) e.Ecx = (e.Ecx & ~0xf0ffu) | (uint)bits << 12 | (uint)(cpus - 1);
            else if (e.Function == 0x8000001e) (e.Eax, e.Ebx, e.Ecx) = ((uint)index, (uint)index, 0);
        }
        return entries;
    }

    /// <summary>Makes leaf 0xb: each core has one thread, and all cores are in one package.</summary>
    private static CpuidEntry2[] Topology(int index, int cpus, int bits)
    {
        const uint hasIndex = 1, thread = 1 << 8, core = 2 << 8;
        return
        [
            new CpuidEntry2 { Function = TopologyLeaf, Index = 0, Flags = hasIndex, Eax = 0, Ebx = 1, Ecx = thread, Edx = (uint)index },
            new CpuidEntry2 { Function = TopologyLeaf, Index = 1, Flags = hasIndex, Eax = (uint)bits, Ebx = (uint)cpus, Ecx = core | 1, Edx = (uint)index },
            new CpuidEntry2 { Function = TopologyLeaf, Index = 2, Flags = hasIndex, Ecx = 2, Edx = (uint)index },
        ];
    }

    /// <summary>Refuses a CPU with features that this host lacks, and a VM with another number of vCPUs.</summary>
    /// <exception cref="IncompatibleStateException">Names the leaf, the register and the bits.</exception>
    internal static void CheckSubset(int vcpu, CpuidEntry2[] theirs, CpuidEntry2[] ours)
    {
        // First, because the number of vCPUs also changes feature bits, and an error about those would blame the host.
        uint cpus = Find(ours, TopologyLeaf, 1, static e => e.Ebx), saved = Find(theirs, TopologyLeaf, 1, static e => e.Ebx);
        if (saved != cpus) throw new IncompatibleStateException($"vCPU {vcpu}: the guest has {saved} vCPUs, this VM {cpus}") { Expected = $"{cpus}", Found = $"{saved}", Hint = $"make this VM with {saved} vCPUs" };
        foreach ((uint function, uint index, string register, Func<CpuidEntry2, uint> bits) in s_features)
        {
            uint wanted = Find(theirs, function, index, bits), have = Find(ours, function, index, bits), missing = wanted & ~have;
            if (missing == 0) continue;
            throw new IncompatibleStateException($"vCPU {vcpu}: the guest's CPU has features that this host lacks: {KvmCpuidNames.Of(function, index, register, missing)}CPUID 0x{function:x}.{index} {register} bits 0x{missing:x}")
            {
                Expected = $"at most 0x{have:x}", Found = $"0x{wanted:x}", Hint = "move the guest to a host with the same or a newer CPU",
            };
        }
        CpuidEntry2 a = Array.Find(theirs, static e => e.Function == 0), b = Array.Find(ours, static e => e.Function == 0);
        if ((a.Ebx, a.Ecx, a.Edx) != (b.Ebx, b.Ecx, b.Edx)) throw new IncompatibleStateException($"vCPU {vcpu}: the guest's CPU is of another vendor than this host's");
    }

    private static uint Find(CpuidEntry2[] entries, uint function, uint index, Func<CpuidEntry2, uint> bits) =>
        entries.Where(e => e.Function == function && e.Index == index).Select(bits).FirstOrDefault();
}
