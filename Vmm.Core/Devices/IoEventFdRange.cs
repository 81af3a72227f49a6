namespace Vmm.Core.Devices;

/// <summary>Which writes of the guest signal an eventfd.</summary>
/// <param name="Address">Guest-physical address or I/O port.</param>
/// <param name="SizeBytes">1, 2, 4 or 8; 0 for writes of any size to memory.</param>
/// <param name="IsPort">Whether it is an I/O port.</param>
/// <param name="Match">The value, or null for any; needs a size.</param>
public readonly record struct IoEventFdRange(ulong Address, int SizeBytes, bool IsPort, ulong? Match = null);
