using Microsoft.Win32.SafeHandles;

namespace Vmm.Core.Interop;

/// <summary>A file descriptor with one owner, closed exactly once. Close-on-exec unless stated where it is made.</summary>
public sealed class OwnedFd : SafeHandleMinusOneIsInvalid
{
    /// <summary>An empty handle, for marshalling.</summary>
    public OwnedFd() : base(ownsHandle: true)
    {
    }

    /// <summary>Takes over <paramref name="fd"/>.</summary>
    /// <param name="fd">An open descriptor.</param>
    /// <param name="ownsFd">False to leave closing to somebody else.</param>
    public OwnedFd(int fd, bool ownsFd = true) : base(ownsFd) => SetHandle(fd);

    /// <summary>The descriptor number; valid only while this handle is open and referenced.</summary>
    public int Number => (int)handle;

    /// <inheritdoc/>
    // A C function returns a 32-bit int; the upper half of the register that the marshaller reads as a handle is undefined.
    public override bool IsInvalid => (int)handle == -1;

    /// <inheritdoc/>
    protected override bool ReleaseHandle() => LibC.close((int)handle) == 0;
}
