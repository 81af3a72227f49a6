using Vmm.Core.SaveVm;

namespace Vmm.Core.VmStates;

/// <summary>Returns a reference to a member of the owner; save and load both use it.</summary>
public delegate ref TValue VmStateRef<in T, TValue>(T owner) where T : class;

/// <summary>Returns an array or buffer of the owner, or a slice of one (QEMU: VMSTATE_SUB_ARRAY, VMSTATE_PARTIAL_BUFFER).</summary>
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

    /// <inheritdoc/>
    public string Name { get; }

    /// <inheritdoc/>
    public string TypeName { get; }

    /// <inheritdoc/>
    public int VersionId { get; }

    /// <inheritdoc/>
    public bool HasFieldExists => _exists is not null;

    /// <inheritdoc/>
    public virtual int? Num => null;

    /// <inheritdoc/>
    public int SizeBytes { get; }

    /// <inheritdoc/>
    public virtual IVmStateDescription? Description => null;

    /// <inheritdoc/>
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
