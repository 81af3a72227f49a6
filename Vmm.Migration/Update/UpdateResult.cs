namespace Vmm.Migration.Update;

/// <summary>How an update went.</summary>
/// <param name="Pid">The process that runs the VM now.</param>
/// <param name="PauseMs">From the VM's stop in the old process to its start in the new one, ms.</param>
/// <param name="TotalMs">From the request to the end, ms.</param>
/// <param name="StreamBytes">Bytes of the migration stream.</param>
public sealed record UpdateResult(int Pid, double PauseMs, double TotalMs, long StreamBytes);
