using System.Numerics;
using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>DMA by messages to the client (vfio-user 3.10). Any thread.</summary>
internal interface IDmaMessages
{
    /// <summary>DMA_READ, in parts the client takes.</summary>
    Errno Read(ulong address, Span<byte> destination);

    /// <summary>DMA_WRITE, in parts the client takes.</summary>
    Errno Write(ulong address, ReadOnlySpan<byte> source);
}
