namespace Vmm.Migration.Update;

/// <summary>The figures of a successful update.</summary>
/// <param name="Pid">The pid of the process that runs the VM now.</param>
/// <param name="PauseMs">Time from the VM's stop in the old process to its start in the new one, ms.</param>
/// <param name="TotalMs">Time from the request to the end of the update, ms.</param>
/// <param name="StreamBytes">Length of the migration stream in bytes.</param>
public sealed record UpdateResult(int Pid, double PauseMs, double TotalMs, long StreamBytes);
