using Vmm.Core.SaveVm;

namespace Vmm.Core.VmStates;

/// <summary>Returns a reference to a member of the owner; save and load both use it. BQL: held.</summary>
public delegate ref TValue VmStateRef<in T, TValue>(T owner) where T : class;

/// <summary>Returns an array or buffer of the owner, or a slice of one (QEMU: VMSTATE_SUB_ARRAY, VMSTATE_PARTIAL_BUFFER). BQL: held.</summary>
public delegate Span<TValue> VmStateSpan<in T, TValue>(T owner) where T : class;

/// <summary>
/// One declared field (QEMU: <c>VMStateField</c>). The factories of <see cref="VmState"/> make fields. Immutable; all owners of a type share them.
/// </summary>
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

    /// <summary>True if a byte before each element says whether it is null (QEMU: VMS_ARRAY_OF_POINTER_AUTO_ALLOC).</summary>
    internal virtual bool HasPresenceBytes => false;

    /// <summary>Tells whether the field is present: the predicate alone decides if there is one, else the version does (stream 2.3).</summary>
    internal bool IsPresent(T owner, int version) => _exists is null ? VersionId <= version : _exists(owner, version);

    /// <summary>True if VMDESC describes an array by its first element (QEMU: <c>vmsd_can_compress</c>).</summary>
    internal virtual bool CanCompress => !HasFieldExists;

    /// <summary>Returns the number of elements to save.</summary>
    internal abstract int Count(T owner, VmStateSaver saver);

    /// <summary>Tells whether an element of a pointer array is null.</summary>
    internal virtual bool IsNull(T owner, int index) => false;

    /// <summary>Writes one element that is not null.</summary>
    internal abstract void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc);

    /// <summary>Reads all elements.</summary>
    internal abstract void Load(T owner, VmStateLoader loader);
}
