namespace Vmm.Migration.Ram;

/// <summary>Flags in the low bits of a RAM record's first word (stream 3; QEMU: <c>RAM_SAVE_FLAG_*</c>).</summary>
[Flags]
internal enum RamSaveFlags : uint
{
    /// <summary>Nothing; illegal on the wire.</summary>
    None = 0,
    /// <summary>A page filled with one byte.</summary>
    Zero = 0x002,
    /// <summary>The setup list.</summary>
    MemSize = 0x004,
    /// <summary>A page of data.</summary>
    Page = 0x008,
    /// <summary>End of the section's body.</summary>
    Eos = 0x010,
    /// <summary>Same block as the record before; the name is omitted.</summary>
    Continue = 0x020,
    /// <summary>A delta.</summary>
    Xbzrle = 0x040,
    /// <summary>RDMA.</summary>
    Hook = 0x080,
    /// <summary>Compressed page, removed in 9.1.</summary>
    CompressPage = 0x100,
    /// <summary>multifd synchronisation point.</summary>
    MultifdFlush = 0x200,
}

/// <summary>Constants of the RAM section.</summary>
internal static class RamConstants
{
    /// <summary>Section name.</summary>
    public const string IdStr = "ram";

    /// <summary>Section version.</summary>
    public const int VersionId = 4;

    /// <summary>Mask of the flag bits.</summary>
    public const ulong FlagMask = 0xfff;

    /// <summary>First byte of an XBZRLE record's payload.</summary>
    public const byte XbzrleEncoding = 1;
}
