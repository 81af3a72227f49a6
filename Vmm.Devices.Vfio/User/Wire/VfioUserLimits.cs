namespace Vmm.Devices.Vfio.User.Wire;

/// <summary>
/// Every number that bounds what a vfio-user peer may make this process hold (vfio-user 1.2, 2, 14). "Ours" marks a limit that no other
/// implementation has; the sentence after it justifies the number. <see cref="VfioUserDeadlines"/> has the limits of time.
/// </summary>
internal static class VfioUserLimits
{
    // Messages.

    /// <summary>Default for the most data of one message, and this project's own limit.</summary>
    internal const int DataXferBytes = 1 << 20;
    /// <summary>Largest max_data_xfer_size that a peer may name (QEMU's own limit).</summary>
    internal const int MaxDataXferBytes = 64 << 20;
    /// <summary>Most data of one message to any other server (vfio-user C-3), because libvfio-user receives a body in one call.</summary>
    internal const int SafeDataBytes = 64 << 10;
    /// <summary>Longest message body of a control command; also the longest VERSION (vfio-user C-5).</summary>
    internal const int ControlBytes = 64 << 10;
    /// <summary>Header and fixed part before the data of a region, DMA or migration message, at most.</summary>
    internal const int DataHeadBytes = 32;
    /// <summary>Bytes that a message may have beside its data.</summary>
    internal const int MessageHeadBytes = 80;
    /// <summary>Descriptors that one message may carry; more are refused by the kernel call.</summary>
    internal const int MessageFds = 16;
    /// <summary>Largest max_msg_fds that a peer may name (libvfio-user's own limit).</summary>
    internal const int MaxMessageFds = 1024;
    /// <summary>Deepest nesting of VERSION's JSON. Ours: the protocol needs 3.</summary>
    internal const int JsonDepth = 16;
    /// <summary>Most entries of one REGION_WRITE_MULTI (QEMU sends 200).</summary>
    internal const int WriteMultiEntries = 2048;
    /// <summary>Largest argsz of DMA_UNMAP and DEVICE_GET_REGION_IO_FDS (libvfio-user's own limit).</summary>
    internal const uint ArgSizeBytes = 1 << 20;
    /// <summary>Longest v1 dirty bitmap (QEMU's own limit).</summary>
    internal const ulong BitmapBytes = 256 << 20;

    // Devices, as a server describes them.

    /// <summary>Most regions of a device (QEMU's own limit).</summary>
    internal const uint Regions = 100;
    /// <summary>Most interrupt indices (QEMU's own limit).</summary>
    internal const uint Irqs = 50;
    /// <summary>Most vectors of one interrupt index (PCI's own limit for MSI-X).</summary>
    internal const uint Vectors = 2048;
    /// <summary>Most sparse areas of one region.</summary>
    internal const int SparseAreas = 64;
    /// <summary>Page size of areas, maps and bitmaps.</summary>
    internal const uint PageBytes = 4096;
    /// <summary>Longest transcript of an open device. Ours: a device with 16 regions and 2048 vectors needs 50 KiB.</summary>
    internal const int TranscriptBytes = 4 << 20;
    /// <summary>Most descriptors in a transcript. Ours: one per region, and some in reserve.</summary>
    internal const int TranscriptFds = 256;

    // Memory that a client maps.

    /// <summary>Largest max_dma_maps that a peer may name, and its default (QEMU's own limit).</summary>
    internal const int DmaMaps = 65535;
    /// <summary>Largest single map (libvfio-user's own limit).</summary>
    internal const ulong DmaMapBytes = 8UL << 40;
    /// <summary>
    /// Most maps that this process reaches by mmap, over all devices; the later ones by pread and pwrite. Ours: the kernel allows a process 65,530
    /// mappings, and the runtime ends the process when it gets none.
    /// </summary>
    internal const int MappedRegions = 8192;
    /// <summary>
    /// Most different files behind the maps of one client; maps of one file share a descriptor. Ours: a VM has one file for each RAM block.
    /// </summary>
    internal const int DmaFiles = 256;
    /// <summary>Most bytes of dirty log for one device. Ours: enough for 8 TiB at 4 KiB per page.</summary>
    internal const ulong DirtyLogBytes = 256UL << 20;
    /// <summary>Largest page of a dirty log.</summary>
    internal const ulong DirtyPageBytes = 1UL << 30;

    // A device's state.

    /// <summary>Most bytes of the state of a hosted PCI device, unless the device says otherwise (vfio-user S-56).</summary>
    internal const ulong StateBytes = 64UL << 20;
    /// <summary>Bytes of state that may wait between the device's code and the client. Ours: a state of any size needs no more memory.</summary>
    internal const int StatePipeBytes = 256 << 10;
    /// <summary>Longest type name in a state (vfio-user S-41).</summary>
    internal const int TypeNameBytes = 64;

    // Clients of a server.

    /// <summary>Connections without a VERSION that one server keeps; a further one takes the place of the oldest. Ours: a client sends its VERSION at once.</summary>
    internal const int Greetings = 16;
    /// <summary>Connections that wait to be accepted. Ours: a burst of strays must not turn a client away, and accepting one takes microseconds.</summary>
    internal const int Backlog = 128;
    /// <summary>Most commands that wait while the device finishes something. Ours: a client that awaits each reply sends none.</summary>
    internal const int DeferredCommands = 1024;
    /// <summary>Most bytes of those commands.</summary>
    internal const long DeferredBytes = 4 << 20;
}
