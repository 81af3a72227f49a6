namespace Vmm.Core.Wire;

/// <summary>
/// Limits of what a peer may make this process hold. "Ours" marks a limit that QEMU does not have; the sentence after it justifies the number.
/// </summary>
internal static class WireLimits
{
    /// <summary>Longest machine name in the configuration section. Ours: QEMU's names have fewer than 64 bytes.</summary>
    public const int MachineNameBytes = 1024;

    /// <summary>Longest VMDESC. Ours: QEMU 11.1's q35 writes 110 KiB.</summary>
    public const int VmDescBytes = 64 << 20;

    /// <summary>Longest return path payload (stream 6.2).</summary>
    public const int ReturnPathPayloadBytes = 512;

    /// <summary>Largest number of section ids in one stream. Ours: a section needs one, and a VM has fewer than 1000 sections.</summary>
    public const int SectionIds = 1 << 16;

    /// <summary>Largest number of RAM blocks in one setup record. Ours: QEMU machines have fewer than 100.</summary>
    public const int RamBlocks = 4096;

    /// <summary>Largest number of capability names in the configuration section. Ours: QEMU knows 20.</summary>
    public const int Capabilities = 256;

    /// <summary>Largest PACKAGED blob. Ours: device state needs no more; QEMU allows 4 GiB - 1 (QEMU: MAX_VM_CMD_PACKAGED_SIZE).</summary>
    public const int PackagedBytes = 1 << 30;

    /// <summary>Largest XBZRLE record (stream 3.4: one page).</summary>
    public const int XbzrleBytes = 4096;

    /// <summary>Deepest nesting of subsections and structs. Ours: QEMU's deepest is 6.</summary>
    public const int VmStateDepth = 32;

    /// <summary>Largest number of elements of one variable array or list. Ours: far more than the table of any device has.</summary>
    public const int VmStateElements = 1 << 24;

    /// <summary>Largest piece of device state in one packet of multifd. Ours: QEMU sends 1 MiB at most.</summary>
    public const int MultifdStateBytes = (1 << 20) + 4096;

    /// <summary>Largest payload of one packet with compressed pages. Ours: 512 KiB that do not compress, and what zlib and zstd add to them.</summary>
    public const int MultifdCompressedBytes = (512 << 10) + (64 << 10);

    /// <summary>Largest window of a zstd frame, as a power of two: memory that each channel of multifd may take (level 20, the highest that QEMU has).</summary>
    public const int ZstdWindowLog = 25;

    /// <summary>Most bytes of one QMP request, and longest token in it (QEMU: MAX_TOKEN_SIZE).</summary>
    public const int QmpRequestBytes = 64 << 20;

    /// <summary>Largest number of tokens in one QMP request (QEMU: MAX_TOKEN_COUNT).</summary>
    public const int QmpTokens = 2 << 20;

    /// <summary>Deepest nesting in one QMP request (QEMU: MAX_NESTING).</summary>
    public const int QmpNesting = 1024;

    /// <summary>Largest number of named descriptors of one QMP client, and of descriptors in all fd sets. Ours: libvirt passes fewer than 100.</summary>
    public const int QmpFds = 1024;

    /// <summary>Longest line of a report during an update. Ours: a word, a pid and a time.</summary>
    public const int UpdateReportBytes = 64;

    /// <summary>Longest CPR state. Ours: a VM has a few thousand descriptors, and a record for one has fewer than 100 bytes.</summary>
    public const int CprStateBytes = 1 << 20;

    /// <summary>Largest number of descriptors in one CPR state. Ours: 2048 vectors for each of two devices, within the usual limit of open files.</summary>
    public const int CprFds = 4096;

    /// <summary>Longest descriptor name in a CPR state, with its terminator. Ours: QEMU's names are device paths.</summary>
    public const int CprNameBytes = 1024;

    /// <summary>Longest manifest of a snapshot. Ours: one has fewer than 1000 bytes.</summary>
    public const int ManifestBytes = 64 << 10;

    /// <summary>Longest VMDESC that the stream viewer parses into a tree. Ours: 100 times what QEMU 11.1's pc writes.</summary>
    public const int ViewerVmDescBytes = 16 << 20;

    /// <summary>Largest number of stream parts that the viewer keeps. Ours: a source sends a section about every 50 ms, so this is 80 minutes.</summary>
    public const int ViewerEntries = 100_000;

    /// <summary>Largest number of field values that the viewer keeps; it skips the rest. Ours: QEMU 11.1's pc has 4,000.</summary>
    public const int ViewerFields = 200_000;

    /// <summary>Largest number of page records that the viewer lists. Ours: 4 GiB of pages.</summary>
    public const int ViewerPages = 1 << 20;

    /// <summary>Largest number of findings that the viewer reports. Ours: nobody reads more.</summary>
    public const int ViewerFindings = 1000;
}
