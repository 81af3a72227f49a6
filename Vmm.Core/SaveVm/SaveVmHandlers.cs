namespace Vmm.Core.SaveVm;

/// <summary>
/// What is registered for a section that code writes and reads: who makes the object of an attempt. Small and without state, so that two
/// attempts cannot see each other (QEMU: <c>SaveVMHandlers</c>).
/// </summary>
public sealed record SaveVmHandlers
{
    /// <summary>Makes the saving half of an attempt; null for a section that is only loaded.</summary>
    public ISavePrepare? Save { get; init; }

    /// <summary>Makes the loading half of an attempt; null for a section that is only saved.</summary>
    public ILoadSetup? Load { get; init; }

    /// <summary>
    /// Whether the section takes part in an attempt; asked once, when the attempt begins. Null means always (QEMU: <c>is_active</c>). BQL: held.
    /// </summary>
    public Func<bool>? IsActive { get; init; }

    /// <summary>
    /// Takes an object's roles. One that implements <see cref="ISavePrepare"/> or <see cref="ILoadSetup"/> makes an object per attempt; one that
    /// keeps nothing between two calls may implement <see cref="ISaveState"/> and <see cref="ILoadState"/> itself and then plays all the roles
    /// that it implements in every attempt.
    /// </summary>
    /// <param name="roles">The object.</param>
    /// <returns>The record; narrow it with <c>with</c>.</returns>
    public static SaveVmHandlers Of(object roles) => new()
    {
        Save = roles as ISavePrepare ?? (SaveRoles.Of(roles) is { IsEmpty: false } save ? new SameRoles(save, null) : null),
        Load = roles as ILoadSetup ?? (LoadRoles.Of(roles) is { IsEmpty: false } load ? new SameRoles(null, load) : null),
    };

    /// <summary>A load writes into the object itself, whatever the load is for.</summary>
    internal bool LoadsInPlace => Load is SameRoles;

    private sealed class SameRoles(SaveRoles? save, LoadRoles? load) : ISavePrepare, ILoadSetup
    {
        public SaveRoles SavePrepare(SaveContext context) => save!;

        public LoadRoles LoadSetup(LoadContext context) => load!;
    }
}

/// <summary>Begins the saving half of an attempt (QEMU: <c>save_prepare</c>).</summary>
public interface ISavePrepare
{
    /// <summary>Makes the object of one attempt, before anything is written. BQL: held.</summary>
    /// <param name="context">What the attempt is asked to do.</param>
    /// <returns>The roles that it plays in this attempt.</returns>
    /// <exception cref="Errors.VmmException">A veto: the attempt fails with this reason, and nothing has been taken.</exception>
    SaveRoles SavePrepare(SaveContext context);
}

/// <summary>Begins the loading half of an attempt (QEMU: <c>load_setup</c>).</summary>
public interface ILoadSetup
{
    /// <summary>Makes the object of one attempt, before the first section is read. BQL: held.</summary>
    /// <param name="context">What the attempt is asked to do.</param>
    /// <returns>The roles that it plays in this attempt.</returns>
    /// <exception cref="Errors.VmmException">The load cannot begin.</exception>
    LoadRoles LoadSetup(LoadContext context);
}
