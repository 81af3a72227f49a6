namespace Vmm.Core.VmStates;

/// <summary>
/// Makes fields of a <see cref="VmStateDescription{T}"/>; names follow QEMU's VMSTATE_ macros. All factories share these parameters: T is the type
/// of the owner; <c>name</c> is the name in VMDESC; <c>member</c> and <c>storage</c> reach the owner's value; <c>since</c> is the first version
/// with the field, 0 if all versions have it; <c>exists</c> gets the owner and the version, and alone decides whether the field is present
/// (stream 2.3), or is null. The delegates are called with the BQL held. Stateless; thread-safe.
/// </summary>
public static partial class VmState
{
    /// <summary>A bool in one byte (QEMU: VMSTATE_BOOL).</summary>
    public static VmStateField<T> Bool<T>(string name, VmStateRef<T, bool> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Bool, member, since, exists);

    /// <summary>An i8 (QEMU: VMSTATE_INT8).</summary>
    public static VmStateField<T> Int8<T>(string name, VmStateRef<T, sbyte> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Int8, member, since, exists);

    /// <summary>An i16 (QEMU: VMSTATE_INT16).</summary>
    public static VmStateField<T> Int16<T>(string name, VmStateRef<T, short> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Int16, member, since, exists);

    /// <summary>An i32 (QEMU: VMSTATE_INT32).</summary>
    public static VmStateField<T> Int32<T>(string name, VmStateRef<T, int> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Int32, member, since, exists);

    /// <summary>An i64 (QEMU: VMSTATE_INT64).</summary>
    public static VmStateField<T> Int64<T>(string name, VmStateRef<T, long> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Int64, member, since, exists);

    /// <summary>A u8 (QEMU: VMSTATE_UINT8).</summary>
    public static VmStateField<T> UInt8<T>(string name, VmStateRef<T, byte> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt8, member, since, exists);

    /// <summary>A u16 (QEMU: VMSTATE_UINT16).</summary>
    public static VmStateField<T> UInt16<T>(string name, VmStateRef<T, ushort> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt16, member, since, exists);

    /// <summary>A u32 (QEMU: VMSTATE_UINT32).</summary>
    public static VmStateField<T> UInt32<T>(string name, VmStateRef<T, uint> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt32, member, since, exists);

    /// <summary>A u64 (QEMU: VMSTATE_UINT64).</summary>
    public static VmStateField<T> UInt64<T>(string name, VmStateRef<T, ulong> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt64, member, since, exists);

    /// <summary>A u8 that loads only if it equals the local value (QEMU: VMSTATE_UINT8_EQUAL).</summary>
    public static VmStateField<T> UInt8Equal<T>(string name, VmStateRef<T, byte> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt8Equal, member, since, exists);

    /// <summary>A u16 that loads only if it equals the local value (QEMU: VMSTATE_UINT16_EQUAL).</summary>
    public static VmStateField<T> UInt16Equal<T>(string name, VmStateRef<T, ushort> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt16Equal, member, since, exists);

    /// <summary>An i32 that loads only if it equals the local value (QEMU: VMSTATE_INT32_EQUAL).</summary>
    public static VmStateField<T> Int32Equal<T>(string name, VmStateRef<T, int> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Int32Equal, member, since, exists);

    /// <summary>A u32 that loads only if it equals the local value (QEMU: VMSTATE_UINT32_EQUAL).</summary>
    public static VmStateField<T> UInt32Equal<T>(string name, VmStateRef<T, uint> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt32Equal, member, since, exists);

    /// <summary>A u64 that loads only if it equals the local value; VMDESC calls it <c>int64 equal</c> (QEMU: VMSTATE_UINT64_EQUAL).</summary>
    public static VmStateField<T> UInt64Equal<T>(string name, VmStateRef<T, ulong> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt64Equal, member, since, exists);

    /// <summary>An i32 that loads only from 0 to the local value (QEMU: VMSTATE_INT32_POSITIVE_LE).</summary>
    public static VmStateField<T> Int32LessEqual<T>(string name, VmStateRef<T, int> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Int32LessEqual, member, since, exists);

    /// <summary>Expiry of a timer in ns of its clock; -1 if the timer is not pending (QEMU: VMSTATE_TIMER_PTR).</summary>
    public static VmStateField<T> Timer<T>(string name, VmStateRef<T, long> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Timer, member, since, exists);

    /// <summary>A double in one u64 (QEMU: CPU_DoubleU).</summary>
    public static VmStateField<T> CpuDouble<T>(string name, VmStateRef<T, ulong> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.CpuDouble, member, since, exists);

    /// <summary>A value of any type; <paramref name="type"/> is its form on the wire (QEMU: VMSTATE_SINGLE).</summary>
    public static VmStateField<T> Single<T, TValue>(string name, VmStateType<TValue> type, VmStateRef<T, TValue> member, int since = 0,
        Func<T, int, bool>? exists = null) where T : class => new SingleField<T, TValue>(name, type, member, since, exists);

    /// <summary>
    /// A field of zero bytes whose predicate must hold, or save and load fail (QEMU: VMSTATE_VALIDATE). Declare it directly after the fields that it
    /// checks, because later fields are not loaded yet.
    /// </summary>
    /// <param name="name">What is wrong, for the error message.</param>
    /// <param name="holds">Gets the owner and the version.</param>
    public static VmStateField<T> Validate<T>(string name, Func<T, int, bool> holds) where T : class => new ValidateField<T>(name, holds);

    /// <summary>Bytes that only older versions use; a save writes zeros, a load skips them (QEMU: VMSTATE_UNUSED).</summary>
    public static VmStateField<T> Unused<T>(int sizeBytes, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        new UnusedField<T>(sizeBytes, since, exists);
}
