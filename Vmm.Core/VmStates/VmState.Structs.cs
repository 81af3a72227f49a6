namespace Vmm.Core.VmStates;

public static partial class VmState
{
    /// <summary>
    /// A nested object with a description of its own. Neither its name nor its version is on the wire: its version is the description's own on
    /// both sides, whatever the section's header says (QEMU: VMSTATE_STRUCT, VMSTATE_STRUCT_POINTER).
    /// </summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <typeparam name="TNested">Nested object.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="description">Its description.</param>
    /// <param name="member">The object.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Struct<T, TNested>(string name, VmStateDescription<TNested> description, Func<T, TNested> member, int since = 0,
        Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new StructField<T, TNested>(name, StructForm.Struct, description, null, member, since, exists);

    /// <summary>As <see cref="Struct"/>, in an explicit version on both sides (QEMU: VMSTATE_VSTRUCT).</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <typeparam name="TNested">Nested object.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="description">Its description.</param>
    /// <param name="structVersionId">The version.</param>
    /// <param name="member">The object.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> VStruct<T, TNested>(string name, VmStateDescription<TNested> description, int structVersionId, Func<T, TNested> member,
        int since = 0, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new StructField<T, TNested>(name, StructForm.VStruct, description, structVersionId, member, since, exists);

    /// <summary>
    /// A view of the owner that exists only while it is saved or loaded: its hooks copy and compute (QEMU: VMSTATE_WITH_TMP). It loads in version
    /// <paramref name="since"/>.
    /// </summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <typeparam name="TTemporary">The view.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="description">Its description.</param>
    /// <param name="create">Makes a view that knows its owner.</param>
    /// <param name="since">First version with the field, and the version in which the view loads.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> WithTmp<T, TTemporary>(string name, VmStateDescription<TTemporary> description, Func<T, TTemporary> create, int since = 0,
        Func<T, int, bool>? exists = null) where T : class where TTemporary : class =>
        new StructField<T, TTemporary>(name, StructForm.Tmp, description, null, create, since, exists);

    /// <summary>A fixed number of nested objects (QEMU: VMSTATE_STRUCT_ARRAY).</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <typeparam name="TNested">Nested object.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="description">Description of one.</param>
    /// <param name="num">Number of elements.</param>
    /// <param name="storage">Exactly so many objects.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> StructArray<T, TNested>(string name, VmStateDescription<TNested> description, int num, Func<T, IReadOnlyList<TNested>> storage,
        int since = 0, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new StructArrayField<T, TNested>(name, description, num, static _ => 0, storage, since, exists);

    /// <summary>As many nested objects as another member says (QEMU: VMSTATE_STRUCT_VARRAY_UINT8, _UINT32, _INT32).</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <typeparam name="TNested">Nested object.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="description">Description of one.</param>
    /// <param name="count">The other member.</param>
    /// <param name="storage">Objects for the largest count.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> StructVarArray<T, TNested>(string name, VmStateDescription<TNested> description, Func<T, long> count,
        Func<T, IReadOnlyList<TNested>> storage, int since = 0, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new StructArrayField<T, TNested>(name, description, null, count, storage, since, exists);

    /// <summary>As <see cref="StructVarArray"/>, allocated on load (QEMU: VMSTATE_STRUCT_VARRAY_ALLOC).</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <typeparam name="TNested">Nested object.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="description">Description of one.</param>
    /// <param name="count">The other member.</param>
    /// <param name="max">Largest count that the device can have.</param>
    /// <param name="create">Makes an object to load.</param>
    /// <param name="storage">The array; replaced on load.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> StructVarArrayAlloc<T, TNested>(string name, VmStateDescription<TNested> description, Func<T, long> count, int max,
        Func<T, TNested> create, VmStateRef<T, TNested[]> storage, int since = 0, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new StructVarArrayAllocField<T, TNested>(name, description, count, max, create, storage, since, exists);

    /// <summary>
    /// A fixed number of objects of which some may be missing. A missing one is the byte 0x30, a present one is sent as it is, so both sides must
    /// agree on which are missing (QEMU: VMSTATE_ARRAY_OF_POINTER_TO_STRUCT).
    /// </summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <typeparam name="TNested">Nested object.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="description">Description of one.</param>
    /// <param name="num">Number of elements.</param>
    /// <param name="storage">Exactly so many entries.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> PointerArray<T, TNested>(string name, VmStateDescription<TNested> description, int num, Func<T, IReadOnlyList<TNested?>> storage,
        int since = 0, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new PointerArrayField<T, TNested>(name, description, num, storage, since, exists);

    /// <summary>
    /// As <see cref="PointerArray"/>, but each element starts with a byte that says whether it is there, and load makes or drops objects
    /// accordingly. Only QEMU 11 and newer know this form (QEMU: VMS_ARRAY_OF_POINTER_AUTO_ALLOC).
    /// </summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <typeparam name="TNested">Nested object.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="description">Description of one.</param>
    /// <param name="num">Number of elements.</param>
    /// <param name="create">Makes an object to load.</param>
    /// <param name="storage">Exactly so many entries.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> PointerArrayAutoAlloc<T, TNested>(string name, VmStateDescription<TNested> description, int num, Func<T, TNested> create,
        Func<T, TNested?[]> storage, int since = 0, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new PointerArrayAutoAllocField<T, TNested>(name, description, num, create, storage, since, exists);

    /// <summary>
    /// A list: a byte 1 before each element, a byte 0 at the end. Load replaces the list's content (QEMU: VMSTATE_QTAILQ_V).
    /// </summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <typeparam name="TNested">Element.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="description">Description of one element.</param>
    /// <param name="list">The list.</param>
    /// <param name="create">Makes an element to load.</param>
    /// <param name="max">Most elements that the device can have.</param>
    /// <param name="since">First version with the field, and the version in which elements load.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> QTailQ<T, TNested>(string name, VmStateDescription<TNested> description, Func<T, List<TNested>> list, Func<T, TNested> create,
        int max, int since, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new ListField<T, TNested>(name, "qtailq", description, list, create, max, since, exists);

    /// <summary>As <see cref="QTailQ"/>, under the other name (QEMU: VMSTATE_QLIST_V).</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <typeparam name="TNested">Element.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="description">Description of one element.</param>
    /// <param name="list">The list.</param>
    /// <param name="create">Makes an element to load.</param>
    /// <param name="max">Most elements that the device can have.</param>
    /// <param name="since">First version with the field, and the version in which elements load.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> QList<T, TNested>(string name, VmStateDescription<TNested> description, Func<T, List<TNested>> list, Func<T, TNested> create,
        int max, int since, Func<T, int, bool>? exists = null) where T : class where TNested : class =>
        new ListField<T, TNested>(name, "qlist", description, list, create, max, since, exists);
}
