namespace Vmm.Core.Wire;

/// <summary>Limits on what a peer may make us hold; each says where its number comes from.</summary>
internal static class WireLimits
{
    /// <summary>Longest machine name in the configuration section. Ours: QEMU's names are under 64 bytes.</summary>
    public const int MachineNameBytes = 1024;

    /// <summary>Longest VMDESC we hold. Ours: QEMU 11.1's q35 writes 110 KiB.</summary>
    public const int VmDescBytes = 64 << 20;

    /// <summary>Longest return path payload (stream 6.2).</summary>
    public const int ReturnPathPayloadBytes = 512;

    /// <summary>Most RAM blocks in one setup record. Ours: QEMU machines have under 100.</summary>
    public const int RamBlocks = 4096;

    /// <summary>Most capability names in the configuration section. Ours: QEMU knows 20.</summary>
    public const int Capabilities = 256;

    /// <summary>Largest PACKAGED blob (QEMU: MAX_VM_CMD_PACKAGED_SIZE, 4 GiB - 1; ours is what device state needs).</summary>
    public const int PackagedBytes = 1 << 30;

    /// <summary>Largest XBZRLE record (stream 3.4: one page).</summary>
    public const int XbzrleBytes = 4096;

    /// <summary>Deepest nesting of subsections and structs. Ours: QEMU's deepest is 6.</summary>
    public const int VmStateDepth = 32;

    /// <summary>Most elements of one variable array or list. Ours: far above any device's table.</summary>
    public const int VmStateElements = 1 << 24;

    /// <summary>Longest CPR state. Ours: a record has under 100 bytes, and a VM some thousand descriptors.</summary>
    public const int CprStateBytes = 1 << 20;

    /// <summary>Most descriptors of one CPR state. Ours: 2048 vectors of two devices; under the usual limit of open files.</summary>
    public const int CprFds = 4096;

    /// <summary>Longest descriptor name in a CPR state, terminator included. Ours: QEMU's are device paths.</summary>
    public const int CprNameBytes = 1024;

    /// <summary>Longest VMDESC that the stream viewer parses; a tree of it is kept. Ours: 100 times what QEMU 11.1's pc writes.</summary>
    public const int ViewerVmDescBytes = 16 << 20;

    /// <summary>Most pieces of a stream that the viewer keeps. Ours: a section leaves about every 50 ms, so this is an hour and a half of PARTs.</summary>
    public const int ViewerEntries = 100_000;

    /// <summary>Most field values the viewer keeps; the rest is skipped by length. Ours: QEMU 11.1's pc has 4,000.</summary>
    public const int ViewerFields = 200_000;

    /// <summary>Most page records the viewer lists. Ours: 4 GiB of pages.</summary>
    public const int ViewerPages = 1 << 20;

    /// <summary>Most findings the viewer reports.</summary>
    public const int ViewerFindings = 1000;
}
