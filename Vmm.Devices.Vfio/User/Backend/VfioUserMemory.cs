using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>Memory of a hosted device that a client may map: a memfd, sealed against shrinking, and this process's mapping of it. Thread-safe.</summary>
public sealed class VfioUserMemory : IDisposable
{
    private readonly MappedRegion _map;

    /// <summary>Makes zeroed memory.</summary>
    /// <param name="name">Name of the memfd in /proc.</param>
    /// <param name="sizeBytes">Size in bytes, a multiple of 4096.</param>
    /// <exception cref="ChannelException">The system refused the memory.</exception>
    public VfioUserMemory(string name, ulong sizeBytes)
    {
        ArgumentOutOfRangeException.ThrowIfNotEqual(sizeBytes % 4096, 0UL, nameof(sizeBytes));
        Fd = Posix.MemFd(name, (long)sizeBytes);
        try
        {
            _map = MappedRegion.Map(Fd, sizeBytes, shared: true, 0, name);
        }
        catch (ChannelException)
        {
            Fd.Dispose();
            throw;
        }
    }

    /// <summary>Size in bytes.</summary>
    public ulong SizeBytes => _map.LengthBytes;

    internal OwnedFd Fd { get; }

    /// <summary>A view of a part; the client may change the bytes at any time.</summary>
    /// <param name="offset">First byte, from the start of the memory.</param>
    /// <param name="length">Length in bytes.</param>
    /// <returns>The mapped bytes; valid until disposal.</returns>
    public Span<byte> Slice(ulong offset, int length) => _map.Slice(offset, length);

    /// <inheritdoc/>
    public void Dispose()
    {
        _map.Dispose();
        Fd.Dispose();
    }
}
