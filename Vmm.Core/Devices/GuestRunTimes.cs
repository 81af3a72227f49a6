namespace Vmm.Core.Devices;

/// <summary>
/// The times at which the vCPU threads entered and left the guest: the downtime that the guest can notice, apart from delays by the host's scheduler.
/// CLOCK_MONOTONIC in ns, one clock for all processes of a host; 0 for never.
/// </summary>
/// <param name="EnteredAtNs">Time at which the first vCPU entered the guest after the last start.</param>
/// <param name="LeftAtNs">Time at which the last vCPU left the guest.</param>
internal readonly record struct GuestRunTimes(long EnteredAtNs, long LeftAtNs);
