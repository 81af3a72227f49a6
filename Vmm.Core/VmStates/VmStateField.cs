using Vmm.Core.SaveVm;

namespace Vmm.Core.VmStates;

/// <summary>Reference to a member of the owner; one accessor serves both directions.</summary>
/// <typeparam name="T">Owner.</typeparam>
/// <typeparam name="TValue">Member.</typeparam>
/// <param name="owner">The owner.</param>
/// <returns>The member.</returns>
public delegate ref TValue VmStateRef<in T, TValue>(T owner) where T : class;

/// <summary>Storage of an array or buffer of the owner, or a slice of it (QEMU: VMSTATE_SUB_ARRAY, VMSTATE_PARTIAL_BUFFER).</summary>
/// <typeparam name="T">Owner.</typeparam>
/// <typeparam name="TValue">Element.</typeparam>
/// <param name="owner">The owner.</param>
/// <returns>The elements.</returns>
public delegate Span<TValue> VmStateSpan<in T, TValue>(T owner) where T : class;

/// <summary>
/// One declared field (QEMU: <c>VMStateField</c>). Made by the factories of <see cref="VmState"/>; immutable, so shared by all owners.
/// </summary>
/// <typeparam name="T">Owner.</typeparam>
public abstract class VmStateField<T> : IVmStateFieldInfo where T : class
{
    private readonly Func<T, int, bool>? _exists;

    private protected VmStateField(string name, string typeName, int sizeBytes, int since, Func<T, int, bool>? exists)
    {
        ArgumentException.ThrowIfNullOrEmpty(name);
        ArgumentOutOfRangeException.ThrowIfNegative(sizeBytes);
        Name = name;
        TypeName = typeName;
        SizeBytes = sizeBytes;
        VersionId = since;
        _exists = exists;
    }

    /// <summary>Name as in VMDESC.</summary>
    public string Name { get; }

    /// <summary>Type name as in VMDESC, e.g. <c>uint32</c> (stream 2.1).</summary>
    public string TypeName { get; }

    /// <summary>First version of the section that has the field (QEMU: <c>version_id</c>); 0 for every version.</summary>
    public int VersionId { get; }

    /// <summary>A predicate decides about presence, not the version (QEMU: <c>field_exists</c>).</summary>
    public bool HasFieldExists => _exists is not null;

    /// <summary>Number of elements of a fixed array (QEMU: <c>num</c> with VMS_ARRAY), or null.</summary>
    public virtual int? Num => null;

    /// <summary>Bytes of one element in memory as QEMU counts them; 0 where only the owner knows, at run time.</summary>
    public int SizeBytes { get; }

    /// <summary>The nested description, or null.</summary>
    public virtual IVmStateDescription? Description => null;

    /// <summary>The field has no bytes; its predicate must hold (QEMU: VMS_MUST_EXIST).</summary>
    public virtual bool IsMustExist => false;

    /// <summary>True if each element's pointer is announced by a byte (QEMU: VMS_ARRAY_OF_POINTER_AUTO_ALLOC).</summary>
    internal virtual bool HasPresenceBytes => false;

    /// <summary>A predicate decides alone; without one, the version does (stream 2.3).</summary>
    internal bool IsPresent(T owner, int version) => _exists is null ? VersionId <= version : _exists(owner, version);

    /// <summary>Whether VMDESC describes an array by its first element (QEMU: <c>vmsd_can_compress</c>).</summary>
    internal virtual bool CanCompress => !HasFieldExists;

    /// <summary>Number of elements to save.</summary>
    internal abstract int Count(T owner, VmStateSaver saver);

    /// <summary>Whether an element of a pointer array is null.</summary>
    internal virtual bool IsNull(T owner, int index) => false;

    /// <summary>Writes one element that is not null.</summary>
    internal abstract void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc);

    /// <summary>Reads all elements.</summary>
    internal abstract void Load(T owner, VmStateLoader loader);
}
