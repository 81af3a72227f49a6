using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>Memory of a hosted device that a client may map: a memfd, sealed against shrinking, and our view of it. Thread-safe.</summary>
public sealed class VfioUserMemory : IDisposable
{
    private readonly MappedRegion _map;

    /// <summary>Makes zeroed memory.</summary>
    /// <param name="name">Shown in /proc.</param>
    /// <param name="sizeBytes">A page multiple.</param>
    /// <exception cref="ChannelException">The system refused it.</exception>
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

    /// <summary>Bytes.</summary>
    public ulong SizeBytes => _map.LengthBytes;

    internal OwnedFd Fd { get; }

    /// <summary>A view; the client may change it at any time.</summary>
    /// <param name="offset">From the start.</param>
    /// <param name="length">Bytes.</param>
    /// <returns>The bytes.</returns>
    public Span<byte> Slice(ulong offset, int length) => _map.Slice(offset, length);

    /// <inheritdoc/>
    public void Dispose()
    {
        _map.Dispose();
        Fd.Dispose();
    }
}
