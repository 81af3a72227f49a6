namespace Vmm.Core.SaveVm;

/// <summary>Section type bytes (stream 1.1; QEMU: <c>QEMU_VM_*</c>).</summary>
internal enum SectionType : byte
{
    /// <summary>End of the stream or of a package.</summary>
    Eof = 0x00,
    /// <summary>First section of an iterable.</summary>
    Start = 0x01,
    /// <summary>An iteration.</summary>
    Part = 0x02,
    /// <summary>Last part of an iterable.</summary>
    End = 0x03,
    /// <summary>One-shot section.</summary>
    Full = 0x04,
    /// <summary>Subsection; only inside bodies.</summary>
    Subsection = 0x05,
    /// <summary>VMDESC; only after EOF.</summary>
    VmDescription = 0x06,
    /// <summary>Configuration; only after the header.</summary>
    Configuration = 0x07,
    /// <summary>A command.</summary>
    Command = 0x08,
    /// <summary>Footer of a section.</summary>
    Footer = 0x7e,
}
