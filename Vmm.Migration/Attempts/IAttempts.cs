namespace Vmm.Migration.Attempts;

/// <summary>Admits at most one attempt of a VM at a time.</summary>
internal interface IAttempts
{
    /// <summary>The parts of the VM that an attempt needs.</summary>
    MigrationContext Context { get; }

    /// <summary>Refuses migrations until the result is disposed, while a snapshot is saved or loaded.</summary>
    /// <exception cref="Core.Errors.MigrationBlockedException">An attempt runs.</exception>
    IDisposable BeginExclusive();
}
