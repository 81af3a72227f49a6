namespace Vmm.Core.VmStates;

public static partial class VmState
{
    /// <summary>
    /// A fixed number of values, without a count on the wire; 2-D arrays are sent row by row (QEMU: VMSTATE_UINT32_ARRAY and its like,
    /// VMSTATE_SUB_ARRAY for a slice).
    /// </summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <typeparam name="TValue">Element.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="type">Form of one element.</param>
    /// <param name="num">Number of elements.</param>
    /// <param name="storage">Exactly so many elements.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Array<T, TValue>(string name, VmStateType<TValue> type, int num, VmStateSpan<T, TValue> storage, int since = 0,
        Func<T, int, bool>? exists = null) where T : class => new ArrayField<T, TValue>(name, type, num, storage, since, exists);

    /// <summary>
    /// As many values as another member says, which an earlier field must have loaded (QEMU: VMSTATE_VARRAY_UINT8, _UINT16, _UINT32, _INT32,
    /// VMSTATE_VARRAY_MULTIPLY). A count over the storage is refused on load.
    /// </summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <typeparam name="TValue">Element.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="type">Form of one element.</param>
    /// <param name="count">The other member.</param>
    /// <param name="storage">Room for the largest count.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> VarArray<T, TValue>(string name, VmStateType<TValue> type, Func<T, long> count, VmStateSpan<T, TValue> storage, int since = 0,
        Func<T, int, bool>? exists = null) where T : class => new VarArrayField<T, TValue>(name, type, count, storage, since, exists);

    /// <summary>As <see cref="VarArray"/>, allocated on load (QEMU: VMSTATE_VARRAY_UINT32_ALLOC and its like).</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <typeparam name="TValue">Element.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="type">Form of one element.</param>
    /// <param name="count">The other member.</param>
    /// <param name="max">Largest count that the device can have.</param>
    /// <param name="storage">The array; replaced on load.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> VarArrayAlloc<T, TValue>(string name, VmStateType<TValue> type, Func<T, long> count, int max, VmStateRef<T, TValue[]> storage,
        int since = 0, Func<T, int, bool>? exists = null) where T : class => new VarArrayAllocField<T, TValue>(name, type, count, max, storage, since, exists);

    /// <summary>Raw bytes of a fixed number (QEMU: VMSTATE_BUFFER, VMSTATE_STATIC_BUFFER, VMSTATE_PARTIAL_BUFFER for a slice).</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="sizeBytes">Number of bytes.</param>
    /// <param name="storage">Exactly so many bytes.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Buffer<T>(string name, int sizeBytes, VmStateSpan<T, byte> storage, int since = 0, Func<T, int, bool>? exists = null)
        where T : class => new BufferField<T>(name, sizeBytes, storage, since, exists);

    /// <summary>Raw bytes, as many as another member says (QEMU: VMSTATE_VBUFFER, VMSTATE_VBUFFER_UINT32).</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="sizeBytes">The other member; a product for VMSTATE_VBUFFER_MULTIPLY.</param>
    /// <param name="storage">Room for the largest size.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> VBuffer<T>(string name, Func<T, long> sizeBytes, VmStateSpan<T, byte> storage, int since = 0, Func<T, int, bool>? exists = null)
        where T : class => new VBufferField<T>(name, sizeBytes, storage, since, exists);

    /// <summary>As <see cref="VBuffer"/>, allocated on load (QEMU: VMSTATE_VBUFFER_ALLOC_UINT32).</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="sizeBytes">The other member.</param>
    /// <param name="maxBytes">Largest size that the device can have.</param>
    /// <param name="storage">The array; replaced on load.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> VBufferAlloc<T>(string name, Func<T, long> sizeBytes, int maxBytes, VmStateRef<T, byte[]> storage, int since = 0,
        Func<T, int, bool>? exists = null) where T : class => new VBufferAllocField<T>(name, sizeBytes, maxBytes, storage, since, exists);

    /// <summary>A bitmap: whole u64 words, bit k in word k / 64 (QEMU: VMSTATE_BITMAP).</summary>
    /// <typeparam name="T">Owner.</typeparam>
    /// <param name="name">Name.</param>
    /// <param name="bits">Number of bits, another member.</param>
    /// <param name="storage">Room for the largest number.</param>
    /// <param name="since">First version with the field.</param>
    /// <param name="exists">Presence, or null.</param>
    /// <returns>The field.</returns>
    public static VmStateField<T> Bitmap<T>(string name, Func<T, long> bits, VmStateSpan<T, ulong> storage, int since = 0, Func<T, int, bool>? exists = null)
        where T : class => new BitmapField<T>(name, bits, storage, since, exists);
}
