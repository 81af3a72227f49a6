namespace Vmm.Migration.Attempts;

/// <summary>The rule that a VM has at most one attempt at a time, and what attempts are made from.</summary>
internal interface IAttempts
{
    /// <summary>What attempts need of the VM.</summary>
    MigrationContext Context { get; }

    /// <summary>Keeps migrations out while a snapshot is saved or loaded.</summary>
    /// <returns>Dispose to let them in again.</returns>
    /// <exception cref="Core.Errors.MigrationBlockedException">An attempt runs.</exception>
    IDisposable BeginExclusive();
}
