using Vmm.Core.Memory;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Ram;

/// <summary>The RAM that a stream leaves out (QEMU: <c>migrate_ram_is_ignored</c>).</summary>
internal enum IgnoredRam
{
    /// <summary>None: every page is sent.</summary>
    None,
    /// <summary>Blocks in files that both sides have (capability x-ignore-shared): QEMU from 11 on, and this side, leave out those that they map shared.</summary>
    SharedFiles,
    /// <summary>All blocks: the new process has the memory's descriptors (cpr-transfer, cpr-exec).</summary>
    All,
}

/// <summary>The rule that says which RAM is left out; the same on both sides.</summary>
internal static class IgnoredRamRule
{
    /// <summary>The RAM that an attempt leaves out.</summary>
    internal static IgnoredRam Of(MigrationMode mode, MigrationCapabilities capabilities) => mode is MigrationMode.CprTransfer or MigrationMode.CprExec ? IgnoredRam.All
        : capabilities.IsOn(MigrationCapability.XIgnoreShared) ? IgnoredRam.SharedFiles : IgnoredRam.None;

    internal static bool Covers(this IgnoredRam ignored, RamBlock block) => ignored switch
    {
        IgnoredRam.All => true,
        IgnoredRam.SharedFiles => block is { IsShared: true, FilePath: not null },
        _ => false,
    };
}
