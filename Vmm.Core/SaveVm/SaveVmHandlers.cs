namespace Vmm.Core.SaveVm;

/// <summary>
/// The registration of a section that code writes and reads: it makes an object for each attempt. It has no state itself, so that one attempt cannot
/// influence another (QEMU: <c>SaveVMHandlers</c>).
/// </summary>
public sealed record SaveVmHandlers
{
    /// <summary>Makes the object of an attempt to save; null for a section that is only loaded.</summary>
    public ISavePrepare? Save { get; init; }

    /// <summary>Makes the object of an attempt to load; null for a section that is only saved.</summary>
    public ILoadSetup? Load { get; init; }

    /// <summary>
    /// Says whether the section takes part in an attempt; called once, when the attempt begins. Null means always (QEMU: <c>is_active</c>). BQL: held.
    /// </summary>
    public Func<bool>? IsActive { get; init; }

    /// <summary>
    /// The registration of an object. If it implements <see cref="ISavePrepare"/> or <see cref="ILoadSetup"/>, it makes an object for each attempt. If it
    /// keeps nothing between two calls, it may implement <see cref="ISaveState"/> and <see cref="ILoadState"/> itself; it then plays all the roles that it
    /// implements in every attempt.
    /// </summary>
    public static SaveVmHandlers Of(object roles) => new()
    {
        Save = roles as ISavePrepare ?? (SaveRoles.Of(roles) is { IsEmpty: false } save ? new SameRoles(save, null) : null),
        Load = roles as ILoadSetup ?? (LoadRoles.Of(roles) is { IsEmpty: false } load ? new SameRoles(null, load) : null),
    };

    /// <summary>A load changes the registered object itself, even a load that only checks.</summary>
    internal bool LoadsInPlace => Load is SameRoles;

    private sealed class SameRoles(SaveRoles? save, LoadRoles? load) : ISavePrepare, ILoadSetup
    {
        public SaveRoles SavePrepare(SaveContext context) => save!;

        public LoadRoles LoadSetup(LoadContext context) => load!;
    }
}

/// <summary>Begins an attempt to save (QEMU: <c>save_prepare</c>).</summary>
public interface ISavePrepare
{
    /// <summary>Makes the object of one attempt, before anything is written, and returns the roles that it plays. BQL: held.</summary>
    /// <exception cref="Errors.VmmException">The section refuses: the attempt fails with this reason. It has taken nothing.</exception>
    SaveRoles SavePrepare(SaveContext context);
}

/// <summary>Begins an attempt to load (QEMU: <c>load_setup</c>).</summary>
public interface ILoadSetup
{
    /// <summary>Makes the object of one attempt, before the first section is read, and returns the roles that it plays. BQL: held.</summary>
    /// <exception cref="Errors.VmmException">The load cannot begin.</exception>
    LoadRoles LoadSetup(LoadContext context);
}
