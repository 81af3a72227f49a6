namespace Vmm.Core.Devices;

/// <summary>
/// When a guest ran, as the threads of its vCPUs saw it: what it can notice of its downtime, apart from what the host's scheduler does to it.
/// CLOCK_MONOTONIC in ns, one clock for all processes of a host; 0 for never.
/// </summary>
/// <param name="EnteredAtNs">When the first vCPU went to run the guest after the last start.</param>
/// <param name="LeftAtNs">When the last vCPU left the guest.</param>
internal readonly record struct GuestRunTimes(long EnteredAtNs, long LeftAtNs);
