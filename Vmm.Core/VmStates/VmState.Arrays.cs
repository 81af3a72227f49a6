namespace Vmm.Core.VmStates;

public static partial class VmState
{
    /// <summary>
    /// <paramref name="num"/> values without a count on the wire; a 2-D array is sent row by row. <paramref name="storage"/> must hold exactly that many
    /// elements (QEMU: VMSTATE_UINT32_ARRAY and its like; VMSTATE_SUB_ARRAY for a slice).
    /// </summary>
    public static VmStateField<T> Array<T, TValue>(string name, VmStateType<TValue> type, int num, VmStateSpan<T, TValue> storage, int since = 0,
        Func<T, int, bool>? exists = null) where T : class => new ArrayField<T, TValue>(name, type, num, storage, since, exists);

    /// <summary>
    /// As many values as <paramref name="count"/> says, which an earlier field must have loaded. Load refuses a count that <paramref name="storage"/>
    /// cannot hold (QEMU: VMSTATE_VARRAY_UINT8, _UINT16, _UINT32, _INT32, VMSTATE_VARRAY_MULTIPLY).
    /// </summary>
    public static VmStateField<T> VarArray<T, TValue>(string name, VmStateType<TValue> type, Func<T, long> count, VmStateSpan<T, TValue> storage, int since = 0,
        Func<T, int, bool>? exists = null) where T : class => new VarArrayField<T, TValue>(name, type, count, storage, since, exists);

    /// <summary>
    /// As <see cref="VarArray"/>, but load replaces the array in <paramref name="storage"/>. <paramref name="max"/> is the largest count that the device
    /// can have (QEMU: VMSTATE_VARRAY_UINT32_ALLOC and its like).
    /// </summary>
    public static VmStateField<T> VarArrayAlloc<T, TValue>(string name, VmStateType<TValue> type, Func<T, long> count, int max, VmStateRef<T, TValue[]> storage,
        int since = 0, Func<T, int, bool>? exists = null) where T : class => new VarArrayAllocField<T, TValue>(name, type, count, max, storage, since, exists);

    /// <summary>
    /// <paramref name="sizeBytes"/> raw bytes; <paramref name="storage"/> must have exactly this size (QEMU: VMSTATE_BUFFER, VMSTATE_STATIC_BUFFER;
    /// VMSTATE_PARTIAL_BUFFER for a slice).
    /// </summary>
    public static VmStateField<T> Buffer<T>(string name, int sizeBytes, VmStateSpan<T, byte> storage, int since = 0, Func<T, int, bool>? exists = null)
        where T : class => new BufferField<T>(name, sizeBytes, storage, since, exists);

    /// <summary>
    /// As many raw bytes as <paramref name="sizeBytes"/> says, which an earlier field must have loaded. <paramref name="storage"/> must have room for
    /// the largest size (QEMU: VMSTATE_VBUFFER, VMSTATE_VBUFFER_UINT32; a product for VMSTATE_VBUFFER_MULTIPLY).
    /// </summary>
    public static VmStateField<T> VBuffer<T>(string name, Func<T, long> sizeBytes, VmStateSpan<T, byte> storage, int since = 0, Func<T, int, bool>? exists = null)
        where T : class => new VBufferField<T>(name, sizeBytes, storage, since, exists);

    /// <summary>
    /// As <see cref="VBuffer"/>, but load replaces the array in <paramref name="storage"/>. <paramref name="maxBytes"/> is the largest size that the
    /// device can have (QEMU: VMSTATE_VBUFFER_ALLOC_UINT32).
    /// </summary>
    public static VmStateField<T> VBufferAlloc<T>(string name, Func<T, long> sizeBytes, int maxBytes, VmStateRef<T, byte[]> storage, int since = 0,
        Func<T, int, bool>? exists = null) where T : class => new VBufferAllocField<T>(name, sizeBytes, maxBytes, storage, since, exists);

    /// <summary>
    /// A bitmap of as many bits as <paramref name="bits"/> says, in whole u64 words, bit k in word k / 64. <paramref name="storage"/> must have room for
    /// the largest number of bits (QEMU: VMSTATE_BITMAP).
    /// </summary>
    public static VmStateField<T> Bitmap<T>(string name, Func<T, long> bits, VmStateSpan<T, ulong> storage, int since = 0, Func<T, int, bool>? exists = null)
        where T : class => new BitmapField<T>(name, bits, storage, since, exists);
}
