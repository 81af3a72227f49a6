namespace Vmm.Core.VmStates;

/// <summary>
/// Makes fields of a <see cref="VmStateDescription{T}"/>; names follow QEMU's VMSTATE_ macros. In every factory <c>since</c> is the first
/// version with the field, and <c>exists</c>, when given, decides about presence alone (stream 2.3): it gets owner and version.
/// </summary>
public static partial class VmState
{
    /// <summary>QEMU: VMSTATE_BOOL.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Bool<T>(string name, VmStateRef<T, bool> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Bool, member, since, exists);

    /// <summary>QEMU: VMSTATE_INT8.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Int8<T>(string name, VmStateRef<T, sbyte> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Int8, member, since, exists);

    /// <summary>QEMU: VMSTATE_INT16.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Int16<T>(string name, VmStateRef<T, short> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Int16, member, since, exists);

    /// <summary>QEMU: VMSTATE_INT32.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Int32<T>(string name, VmStateRef<T, int> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Int32, member, since, exists);

    /// <summary>QEMU: VMSTATE_INT64.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Int64<T>(string name, VmStateRef<T, long> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Int64, member, since, exists);

    /// <summary>QEMU: VMSTATE_UINT8.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> UInt8<T>(string name, VmStateRef<T, byte> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt8, member, since, exists);

    /// <summary>QEMU: VMSTATE_UINT16.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> UInt16<T>(string name, VmStateRef<T, ushort> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt16, member, since, exists);

    /// <summary>QEMU: VMSTATE_UINT32.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> UInt32<T>(string name, VmStateRef<T, uint> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt32, member, since, exists);

    /// <summary>QEMU: VMSTATE_UINT64.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> UInt64<T>(string name, VmStateRef<T, ulong> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt64, member, since, exists);

    /// <summary>QEMU: VMSTATE_UINT8_EQUAL; loads only what equals the local value.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> UInt8Equal<T>(string name, VmStateRef<T, byte> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt8Equal, member, since, exists);

    /// <summary>QEMU: VMSTATE_UINT16_EQUAL; loads only what equals the local value.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> UInt16Equal<T>(string name, VmStateRef<T, ushort> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt16Equal, member, since, exists);

    /// <summary>QEMU: VMSTATE_INT32_EQUAL; loads only what equals the local value.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Int32Equal<T>(string name, VmStateRef<T, int> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Int32Equal, member, since, exists);

    /// <summary>QEMU: VMSTATE_UINT32_EQUAL; loads only what equals the local value.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> UInt32Equal<T>(string name, VmStateRef<T, uint> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt32Equal, member, since, exists);

    /// <summary>QEMU: VMSTATE_UINT64_EQUAL, named <c>int64 equal</c> in VMDESC; loads only what equals the local value.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> UInt64Equal<T>(string name, VmStateRef<T, ulong> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.UInt64Equal, member, since, exists);

    /// <summary>QEMU: VMSTATE_INT32_POSITIVE_LE; loads only 0 up to the local value.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Int32LessEqual<T>(string name, VmStateRef<T, int> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Int32LessEqual, member, since, exists);

    /// <summary>QEMU: VMSTATE_TIMER_PTR; expiry in ns of its clock, -1 when not pending.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Timer<T>(string name, VmStateRef<T, long> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.Timer, member, since, exists);

    /// <summary>QEMU: CPU_DoubleU as one u64.</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> CpuDouble<T>(string name, VmStateRef<T, ulong> member, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        Single(name, VmStateTypes.CpuDouble, member, since, exists);

    /// <summary>A value of any type (QEMU: VMSTATE_SINGLE).</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <typeparam name="TValue">Value.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="type">Its form on the wire.</param>
    /// <param name="member">The member.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Single<T, TValue>(string name, VmStateType<TValue> type, VmStateRef<T, TValue> member, int since = 0,
        Func<T, int, bool>? exists = null) where T : class => new SingleField<T, TValue>(name, type, member, since, exists);

    /// <summary>
    /// A pseudo-field of no bytes whose predicate must hold, else save and load fail (QEMU: VMSTATE_VALIDATE). Put it right after the fields it
    /// judges: those after it are not loaded yet.
    /// </summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">What is wrong, for the error.</param>
    /// <param name="holds">The predicate; gets owner and version.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Validate<T>(string name, Func<T, int, bool> holds) where T : class => new ValidateField<T>(name, holds);

    /// <summary>Bytes that older versions used; written as zero, skipped on load (QEMU: VMSTATE_UNUSED).</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="sizeBytes">How many.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Unused<T>(int sizeBytes, int since = 0, Func<T, int, bool>? exists = null) where T : class =>
        new UnusedField<T>(sizeBytes, since, exists);
}
