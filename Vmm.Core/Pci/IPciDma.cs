using Vmm.Core.Errors;
using Vmm.Core.Memory;

namespace Vmm.Core.Pci;

/// <summary>
/// The memory that functions reach by DMA: the RAM of their own VM, or the memory of a client that this process serves the function to.
/// Thread-safe. BQL: not held, because the client that answers may itself wait for a thread that needs the BQL.
/// </summary>
public interface IPciDma
{
    /// <summary>Reads memory.</summary>
    /// <param name="address">Address on the bus.</param>
    /// <param name="destination">Filled on success.</param>
    /// <returns>EFAULT if part of the range is not memory; other values come from the owner of the memory.</returns>
    Errno Read(ulong address, Span<byte> destination);

    /// <summary>Writes memory and marks the pages dirty.</summary>
    /// <returns>As <see cref="Read"/>.</returns>
    Errno Write(ulong address, ReadOnlySpan<byte> source);
}

/// <summary>DMA to the RAM of the function's own VM.</summary>
internal sealed class GuestPciDma(GuestMemory memory) : IPciDma
{
    /// <inheritdoc/>
    public Errno Read(ulong address, Span<byte> destination)
    {
        try
        {
            memory.Read(new GuestAddress(address), destination);
            return Errno.None;
        }
        catch (ArgumentOutOfRangeException)
        {
            return Errno.EFAULT;
        }
    }

    /// <inheritdoc/>
    public Errno Write(ulong address, ReadOnlySpan<byte> source)
    {
        try
        {
            memory.Write(new GuestAddress(address), source);
            return Errno.None;
        }
        catch (ArgumentOutOfRangeException)
        {
            return Errno.EFAULT;
        }
    }
}
