using Tmds.Linux;

namespace Vmm.Core.Interop;

/// <summary>What fstat(2) tells about an open file.</summary>
public readonly record struct FileStatus(ulong Device, ulong Inode, uint Mode, uint UserId, ulong SpecialDevice, long SizeBytes, long BlockBytes)
{
    internal bool IsSocket => IsKind(LibC.S_IFSOCK);

    /// <summary>A file with bytes of its own, a memfd included.</summary>
    public bool IsRegularFile => IsKind(LibC.S_IFREG);

    internal bool IsPipe => IsKind(LibC.S_IFIFO);

    internal bool IsCharacterDevice => IsKind(LibC.S_IFCHR);

    /// <summary>The lower twelve bits of the mode.</summary>
    internal uint Permissions => Mode & 0xFFF;

    /// <summary>True if both are the same file, whatever its names.</summary>
    internal bool IsSameFile(FileStatus other) => (Device, Inode) == (other.Device, other.Inode);

    private bool IsKind(mode_t kind) => (Mode & (ushort)LibC.S_IFMT) == (ushort)kind;
}
