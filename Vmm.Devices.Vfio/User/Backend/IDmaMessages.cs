using System.Numerics;
using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>DMA by messages to the client (vfio-user 3.10). Any thread.</summary>
internal interface IDmaMessages
{
    /// <summary>Sends DMA_READ, in parts of at most the client's size.</summary>
    Errno Read(ulong address, Span<byte> destination);

    /// <summary>Sends DMA_WRITE, in parts of at most the client's size.</summary>
    Errno Write(ulong address, ReadOnlySpan<byte> source);
}
