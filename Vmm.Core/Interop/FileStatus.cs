using Tmds.Linux;

namespace Vmm.Core.Interop;

/// <summary>What fstat(2) says of an open file.</summary>
/// <param name="Device">The file system that holds the file.</param>
/// <param name="Inode">The file's number in its file system.</param>
/// <param name="Mode">Kind and permissions, as <c>st_mode</c>.</param>
/// <param name="UserId">The owner.</param>
/// <param name="SpecialDevice">Number of the device that a device node stands for, as <c>dev_t</c>.</param>
/// <param name="SizeBytes">Length in bytes.</param>
/// <param name="BlockBytes">Preferred size of an access; a page of a file of huge pages.</param>
public readonly record struct FileStatus(ulong Device, ulong Inode, uint Mode, uint UserId, ulong SpecialDevice, long SizeBytes, long BlockBytes)
{
    internal bool IsSocket => IsKind(LibC.S_IFSOCK);

    /// <summary>A file with bytes of its own, a memfd included.</summary>
    public bool IsRegularFile => IsKind(LibC.S_IFREG);

    internal bool IsPipe => IsKind(LibC.S_IFIFO);

    internal bool IsCharacterDevice => IsKind(LibC.S_IFCHR);

    /// <summary>The lower twelve bits of the mode.</summary>
    internal uint Permissions => Mode & 0xFFF;

    /// <summary>Whether both are one file, under whatever names.</summary>
    internal bool IsSameFile(FileStatus other) => (Device, Inode) == (other.Device, other.Inode);

    private bool IsKind(mode_t kind) => (Mode & (ushort)LibC.S_IFMT) == (ushort)kind;
}
