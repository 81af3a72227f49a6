using Vmm.Core.Errors;
using Vmm.Core.Memory;

namespace Vmm.Core.Pci;

/// <summary>
/// The memory that functions of a bus master: a VM's own RAM, or a client's when the function is served to another VMM. Thread-safe. BQL: not
/// held, because an answer may have to come from somebody who waits for it.
/// </summary>
public interface IPciDma
{
    /// <summary>Reads.</summary>
    /// <param name="address">Address on the bus.</param>
    /// <param name="destination">Filled on success.</param>
    /// <returns>EFAULT where there is no memory; others from whoever owns it.</returns>
    Errno Read(ulong address, Span<byte> destination);

    /// <summary>Writes; the pages are marked dirty.</summary>
    /// <param name="address">Address on the bus.</param>
    /// <param name="source">Bytes.</param>
    /// <returns>As <see cref="Read"/>.</returns>
    Errno Write(ulong address, ReadOnlySpan<byte> source);
}

/// <summary>A VM's own RAM.</summary>
/// <param name="memory">The RAM.</param>
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
