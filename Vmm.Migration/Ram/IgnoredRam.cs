namespace Vmm.Migration.Ram;

/// <summary>Which RAM a stream leaves out (QEMU: <c>migrate_ram_is_ignored</c>).</summary>
internal enum IgnoredRam
{
    /// <summary>None: every page is sent.</summary>
    None,
    /// <summary>Blocks in a file that both sides map shared (capability x-ignore-shared); every block's address is in the list.</summary>
    SharedFiles,
    /// <summary>All: the other side has the memory's descriptors (cpr-transfer, cpr-exec).</summary>
    All,
}
