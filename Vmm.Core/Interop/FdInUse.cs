namespace Vmm.Core.Interop;

/// <summary>Keeps a descriptor open, and so its number ours, while a system call uses the number. Made by <see cref="OwnedFd.Use"/>.</summary>
internal readonly ref struct FdInUse
{
    private readonly OwnedFd? _fd;

    internal FdInUse(OwnedFd? fd)
    {
        bool added = false;
        fd?.DangerousAddRef(ref added);
        _fd = fd;
    }

    /// <summary>The number; -1 of no descriptor.</summary>
    internal int Number => _fd?.Number ?? -1;

    public void Dispose() => _fd?.DangerousRelease();
}
