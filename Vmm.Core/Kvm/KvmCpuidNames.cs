using System.Numerics;

namespace Vmm.Core.Kvm;

/// <summary>Names of CPU features as in <c>/proc/cpuinfo</c>, so that a user can compare an error message with that file.</summary>
internal static class KvmCpuidNames
{
    /// <summary>Names from bit 0 on; a dash stands for a bit without a name.</summary>
    private static readonly Dictionary<(uint Function, uint Index, string Register), string[]> s_names = new()
    {
        [(1, 0, "ecx")] = Bits("pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor"),
        [(1, 0, "edx")] = Bits("fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"),
        [(7, 0, "ebx")] = Bits("fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl"),
        [(7, 0, "ecx")] = Bits("- avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b enqcmd - pks"),
        [(7, 0, "edx")] = Bits("- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect - md_clear rtm_always_abort - - serialize - tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities ssbd"),
        [(7, 1, "eax")] = Bits("- - - - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - amx_fp16 - avx_ifma - - lam"),
        [(0xd, 1, "eax")] = Bits("xsaveopt xsavec xgetbv1 xsaves xfd"),
        [(0x80000001, 0, "ecx")] = Bits("lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - - - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx"),
        [(0x80000001, 0, "edx")] = Bits("- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow"),
        [(0x80000008, 0, "ebx")] = Bits("clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb wbinvd_int amd_ibrs amd_stibp - amd_stibp_always_on ibrs_same_mode - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no"),
    };

    /// <summary>Returns the names of feature bits.</summary>
    /// <returns>The names, separated by commas and followed by a semicolon; empty if no bit has a name.</returns>
    internal static string Of(uint function, uint index, string register, uint bits)
    {
        if (!s_names.TryGetValue((function, index, register), out string[]? names)) return string.Empty;
        var found = new List<string>();
        for (uint left = bits; left != 0; left &= left - 1)
            if (BitOperations.TrailingZeroCount(left) is var bit && bit < names.Length && names[bit] != "-") found.Add(names[bit]);
        return found.Count == 0 ? string.Empty : $"{string.Join(", ", found)}; ";
    }

    private static string[] Bits(string names) => names.Split(' ');
}
