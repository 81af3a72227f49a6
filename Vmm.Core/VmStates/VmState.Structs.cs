namespace Vmm.Core.VmStates;

public static partial class VmState
{
    /// <summary>
    /// A nested object with a description of its own. The stream carries neither its name nor its version: both sides use the version of the nested
    /// description, whatever the section's header says (QEMU: VMSTATE_STRUCT, VMSTATE_STRUCT_POINTER).
    /// </summary>
    public static VmStateField<T> Struct<T, TNested>(string name, VmStateDescription<TNested> description, Func<T, TNested> member, int since = 0,
        Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new StructField<T, TNested>(name, StructForm.Struct, description, null, member, since, exists);

    /// <summary>As <see cref="Struct"/>, but both sides use version <paramref name="structVersionId"/> (QEMU: VMSTATE_VSTRUCT).</summary>
    public static VmStateField<T> VStruct<T, TNested>(string name, VmStateDescription<TNested> description, int structVersionId, Func<T, TNested> member,
        int since = 0, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new StructField<T, TNested>(name, StructForm.VStruct, description, structVersionId, member, since, exists);

    /// <summary>
    /// A temporary view of the owner, made by <paramref name="create"/> for one save or load; its hooks copy and compute. A load uses version
    /// <paramref name="since"/> of its description (QEMU: VMSTATE_WITH_TMP).
    /// </summary>
    public static VmStateField<T> WithTmp<T, TTemporary>(string name, VmStateDescription<TTemporary> description, Func<T, TTemporary> create, int since = 0,
        Func<T, int, bool>? exists = null) where T : class where TTemporary : class =>
        new StructField<T, TTemporary>(name, StructForm.Tmp, description, null, create, since, exists);

    /// <summary>
    /// <paramref name="num"/> nested objects without a count on the wire; <paramref name="storage"/> must hold exactly that many (QEMU:
    /// VMSTATE_STRUCT_ARRAY).
    /// </summary>
    public static VmStateField<T> StructArray<T, TNested>(string name, VmStateDescription<TNested> description, int num, Func<T, IReadOnlyList<TNested>> storage,
        int since = 0, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new StructArrayField<T, TNested>(name, description, num, static _ => 0, storage, since, exists);

    /// <summary>
    /// As many nested objects as <paramref name="count"/> says, which an earlier field must have loaded. <paramref name="storage"/> must hold objects for
    /// the largest count (QEMU: VMSTATE_STRUCT_VARRAY_UINT8, _UINT32, _INT32).
    /// </summary>
    public static VmStateField<T> StructVarArray<T, TNested>(string name, VmStateDescription<TNested> description, Func<T, long> count,
        Func<T, IReadOnlyList<TNested>> storage, int since = 0, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new StructArrayField<T, TNested>(name, description, null, count, storage, since, exists);

    /// <summary>
    /// As <see cref="StructVarArray"/>, but load replaces the array in <paramref name="storage"/> by objects that <paramref name="create"/> makes.
    /// <paramref name="max"/> is the largest count that the device can have (QEMU: VMSTATE_STRUCT_VARRAY_ALLOC).
    /// </summary>
    public static VmStateField<T> StructVarArrayAlloc<T, TNested>(string name, VmStateDescription<TNested> description, Func<T, long> count, int max,
        Func<T, TNested> create, VmStateRef<T, TNested[]> storage, int since = 0, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new StructVarArrayAllocField<T, TNested>(name, description, count, max, create, storage, since, exists);

    /// <summary>
    /// <paramref name="num"/> nested objects, some of them null. A null object is the byte 0x30 on the wire and any other object its plain bytes, so both
    /// sides must agree which ones are null (QEMU: VMSTATE_ARRAY_OF_POINTER_TO_STRUCT).
    /// </summary>
    public static VmStateField<T> PointerArray<T, TNested>(string name, VmStateDescription<TNested> description, int num, Func<T, IReadOnlyList<TNested?>> storage,
        int since = 0, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new PointerArrayField<T, TNested>(name, description, num, storage, since, exists);

    /// <summary>
    /// As <see cref="PointerArray"/>, but a byte before each element says whether it is null. Load sets elements to null or makes them with
    /// <paramref name="create"/> accordingly. QEMU knows this form since version 11 (QEMU: VMS_ARRAY_OF_POINTER_AUTO_ALLOC).
    /// </summary>
    public static VmStateField<T> PointerArrayAutoAlloc<T, TNested>(string name, VmStateDescription<TNested> description, int num, Func<T, TNested> create,
        Func<T, TNested?[]> storage, int since = 0, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new PointerArrayAutoAllocField<T, TNested>(name, description, num, create, storage, since, exists);

    /// <summary>
    /// A list: a byte 1 before each element, a byte 0 at the end. Load replaces the list's elements by objects that <paramref name="create"/> makes, at
    /// most <paramref name="max"/>, in version <paramref name="since"/> of their description (QEMU: VMSTATE_QTAILQ_V).
    /// </summary>
    public static VmStateField<T> QTailQ<T, TNested>(string name, VmStateDescription<TNested> description, Func<T, List<TNested>> list, Func<T, TNested> create,
        int max, int since, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new ListField<T, TNested>(name, "qtailq", description, list, create, max, since, exists);

    /// <summary>As <see cref="QTailQ"/>, with the type name of QEMU's QLIST in VMDESC (QEMU: VMSTATE_QLIST_V).</summary>
    public static VmStateField<T> QList<T, TNested>(string name, VmStateDescription<TNested> description, Func<T, List<TNested>> list, Func<T, TNested> create,
        int max, int since, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new ListField<T, TNested>(name, "qlist", description, list, create, max, since, exists);
}
