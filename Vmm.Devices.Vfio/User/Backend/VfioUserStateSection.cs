namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>One section of a device's state, read as it is sent: nothing of it is held twice.</summary>
/// <param name="Id">The device's own number for it.</param>
/// <param name="LengthBytes">Bytes.</param>
/// <param name="Fill">Copies a part out: offset from the section's start, and where to; in order.</param>
public sealed record VfioUserStateSection(uint Id, ulong LengthBytes, Action<ulong, Span<byte>> Fill)
{
    /// <summary>The bytes from an offset on, as far as they lie together, for sections that are in memory anyway; null: they are copied out.</summary>
    public Func<ulong, ReadOnlyMemory<byte>>? Memory { get; init; }

    /// <summary>A section of bytes that are there.</summary>
    /// <param name="id">Number.</param>
    /// <param name="bytes">Bytes; not to be changed any more.</param>
    /// <returns>The section.</returns>
    public static VfioUserStateSection Of(uint id, byte[] bytes) =>
        new(id, (ulong)bytes.Length, (offset, destination) => bytes.AsSpan((int)offset, destination.Length).CopyTo(destination));
}
