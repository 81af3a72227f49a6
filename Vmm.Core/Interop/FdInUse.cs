namespace Vmm.Core.Interop;

/// <summary>
/// Keeps a descriptor open during a system call, so that no other thread gets its number. <see cref="OwnedFd.Use"/> makes one.
/// </summary>
internal readonly ref struct FdInUse
{
    private readonly OwnedFd? _fd;

    internal FdInUse(OwnedFd? fd)
    {
        bool added = false;
        fd?.DangerousAddRef(ref added);
        _fd = fd;
    }

    /// <summary>The descriptor's number; -1 without a descriptor.</summary>
    internal int Number => _fd?.Number ?? -1;

    public void Dispose() => _fd?.DangerousRelease();
}
