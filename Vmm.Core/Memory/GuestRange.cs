namespace Vmm.Core.Memory;

/// <summary>An address in the guest's physical address space.</summary>
/// <param name="Value">The address.</param>
public readonly record struct GuestAddress(ulong Value)
{
    /// <summary>Adds an offset in bytes.</summary>
    /// <exception cref="OverflowException">The sum is over 2^64 - 1.</exception>
    public static GuestAddress operator +(GuestAddress address, ulong offset) => new(checked(address.Value + offset));

    /// <summary>Adds an offset in bytes.</summary>
    /// <exception cref="OverflowException">The sum is over 2^64 - 1.</exception>
    public GuestAddress Add(ulong offset) => this + offset;

    /// <inheritdoc/>
    public override string ToString() => $"0x{Value:x}";
}

/// <summary>A range of guest-physical addresses.</summary>
/// <param name="Start">First address.</param>
/// <param name="LengthBytes">Length of the range.</param>
public readonly record struct GuestRange(GuestAddress Start, ulong LengthBytes)
{
    /// <summary>First address after the range (exclusive end).</summary>
    /// <exception cref="OverflowException">The range ends at 2^64.</exception>
    public ulong End => checked(Start.Value + LengthBytes);

    /// <summary>True if the address is inside the range.</summary>
    /// <returns>Start &lt;= address &lt; End.</returns>
    public bool Contains(GuestAddress address) => address.Value >= Start.Value && address.Value - Start.Value < LengthBytes;

    /// <inheritdoc/>
    public override string ToString() => $"{Start}+0x{LengthBytes:x}";
}
