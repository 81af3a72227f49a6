namespace Vmm.Core.Devices;

/// <summary>The guest's writes that signal an eventfd.</summary>
/// <param name="Address">Guest-physical address or I/O port.</param>
/// <param name="SizeBytes">1, 2, 4 or 8; 0 for writes of any size, to memory only.</param>
/// <param name="IsPort">True for an I/O port.</param>
/// <param name="Match">Only writes of this value signal; null for all writes. Needs a size.</param>
internal readonly record struct IoEventFdRange(ulong Address, int SizeBytes, bool IsPort, ulong? Match = null);
