using Microsoft.Win32.SafeHandles;
using Tmds.Linux;

namespace Vmm.Core.Interop;

/// <summary>A file descriptor with one owner, closed exactly once. Close-on-exec, unless its maker says otherwise. Thread-safe.</summary>
public sealed class OwnedFd : SafeHandleMinusOneIsInvalid
{
    /// <summary>Takes ownership of <paramref name="fd"/>.</summary>
    /// <param name="fd">An open descriptor.</param>
    /// <param name="ownsFd">False if somebody else closes it.</param>
    public OwnedFd(int fd, bool ownsFd = true) : base(ownsFd) => SetHandle(fd);

    /// <summary>The descriptor number; valid only while this handle is open and referenced.</summary>
    public int Number => (int)handle;

    /// <summary>Keeps the descriptor open until the result is disposed.</summary>
    /// <exception cref="ObjectDisposedException">The descriptor is closed.</exception>
    internal FdInUse Use() => new(this);

    /// <inheritdoc/>
    protected override bool ReleaseHandle() => LibC.close((int)handle) == 0;
}
