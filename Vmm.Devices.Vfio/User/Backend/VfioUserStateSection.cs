namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>One section of a device's state, read while it is sent, so that no second copy of it is needed.</summary>
/// <param name="Id">The device's own number for the section.</param>
/// <param name="LengthBytes">Length in bytes.</param>
/// <param name="Fill">Copies a part: offset in bytes from the section's start, and the buffer to fill. Called in order, on the session's thread.</param>
public sealed record VfioUserStateSection(uint Id, ulong LengthBytes, Action<ulong, Span<byte>> Fill)
{
    /// <summary>Gives the contiguous bytes from an offset on, for sections that are in memory anyway; null when only <c>Fill</c> can give them.</summary>
    public Func<ulong, ReadOnlyMemory<byte>>? Memory { get; init; }

    /// <summary>Makes a section from bytes in memory.</summary>
    /// <param name="id">The device's own number for the section.</param>
    /// <param name="bytes">The bytes, which must not change any more.</param>
    /// <returns>A section that copies nothing until it is sent.</returns>
    public static VfioUserStateSection Of(uint id, byte[] bytes) =>
        new(id, (ulong)bytes.Length, (offset, destination) => bytes.AsSpan((int)offset, destination.Length).CopyTo(destination));
}
