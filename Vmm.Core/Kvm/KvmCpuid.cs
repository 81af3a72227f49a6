using Vmm.Core.Errors;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>The CPU that guests see: the host's, as KVM offers it, with each vCPU's own number.</summary>
internal static class KvmCpuid
{
    private const uint Hypervisor = 1u << 31, TscDeadline = 1u << 24;

    /// <summary>Leaves whose bits are features; a guest that has seen one must find it everywhere. XCR0's bits count as well.</summary>
    private static readonly (uint Function, uint Index, string Register, Func<CpuidEntry2, uint> Bits)[] s_features =
    [
        (1, 0, "ecx", static e => e.Ecx), (1, 0, "edx", static e => e.Edx),
        (7, 0, "ebx", static e => e.Ebx), (7, 0, "ecx", static e => e.Ecx), (7, 0, "edx", static e => e.Edx),
        (7, 1, "eax", static e => e.Eax), (7, 1, "edx", static e => e.Edx),
        (0xd, 0, "eax", static e => e.Eax), (0xd, 0, "edx", static e => e.Edx), (0xd, 1, "eax", static e => e.Eax),
        (0x80000001, 0, "ecx", static e => e.Ecx), (0x80000001, 0, "edx", static e => e.Edx),
        (0x80000007, 0, "edx", static e => e.Edx), (0x80000008, 0, "ebx", static e => e.Ebx), (0x40000001, 0, "eax", static e => e.Eax),
    ];

    /// <summary>The CPUID of a vCPU.</summary>
    internal static CpuidEntry2[] For(int index, KvmSystem system)
    {
        CpuidEntry2[] entries = [.. system.SupportedCpuid];
        for (int i = 0; i < entries.Length; i++)
        {
            ref CpuidEntry2 e = ref entries[i];
            if (e.Function == 1)
            {
                e.Ebx = (e.Ebx & 0x00ffffff) | (uint)index << 24;
                e.Ecx |= Hypervisor;
                if (system.Extension(KVM_CAP_TSC_DEADLINE_TIMER) > 0) e.Ecx |= TscDeadline;
            }
            else if (e.Function == 0xb) e.Edx = (uint)index;
        }
        return entries;
    }

    /// <summary>Refuses a CPU with features that this host does not have.</summary>
    /// <exception cref="IncompatibleStateException">Names the leaf, the register and the bits.</exception>
    internal static void CheckSubset(int vcpu, CpuidEntry2[] theirs, CpuidEntry2[] ours)
    {
        foreach ((uint function, uint index, string register, Func<CpuidEntry2, uint> bits) in s_features)
        {
            uint wanted = Find(theirs, function, index, bits), have = Find(ours, function, index, bits), missing = wanted & ~have;
            if (missing == 0) continue;
            throw new IncompatibleStateException($"vCPU {vcpu}: the guest's CPU has features that this host lacks: CPUID 0x{function:x}.{index} {register} bits 0x{missing:x}")
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
