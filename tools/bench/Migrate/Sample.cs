namespace Vmm.Tools.Bench.Migrate;

/// <summary>What query-migrate said at one time.</summary>
/// <param name="AtMs">Time since the start.</param>
/// <param name="TransferredBytes">Bytes sent so far.</param>
/// <param name="RemainingBytes">Bytes of RAM that were left.</param>
internal sealed record Sample(long AtMs, long TransferredBytes, long RemainingBytes);
