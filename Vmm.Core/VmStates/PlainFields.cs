using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Core.VmStates;

internal sealed class SingleField<T, TValue>(string name, VmStateType<TValue> type, VmStateRef<T, TValue> member, int since, Func<T, int, bool>? exists)
    : VmStateField<T>(name, type.Name, type.SizeBytes, since, exists) where T : class
{
    internal override int Count(T owner, VmStateSaver saver) => 1;

    internal override void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc) => type.Put(saver.File, member(owner));

    internal override void Load(T owner, VmStateLoader loader) => type.Get(loader, ref member(owner));
}

internal sealed class ValidateField<T>(string name, Func<T, int, bool> holds) : VmStateField<T>(name, "validate", 0, 0, holds) where T : class
{
    public override bool IsMustExist => true;

    internal override int Count(T owner, VmStateSaver saver) => 0;

    internal override void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc) => throw new InvalidOperationException("a validation has no element");

    internal override void Load(T owner, VmStateLoader loader)
    {
    }
}

internal sealed class UnusedField<T>(int sizeBytes, int since, Func<T, int, bool>? exists) : VmStateField<T>("unused", "unused_buffer", sizeBytes, since, exists) where T : class
{
    internal override int Count(T owner, VmStateSaver saver) => 1;

    internal override void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc) => saver.File.WriteZeros(SizeBytes);

    internal override void Load(T owner, VmStateLoader loader) => loader.File.Skip(SizeBytes);
}

/// <summary>Fields that hold an array of values.</summary>
internal abstract class ValuesField<T, TValue>(string name, VmStateType<TValue> type, int since, Func<T, int, bool>? exists)
    : VmStateField<T>(name, type.Name, type.SizeBytes, since, exists) where T : class
{
    internal abstract Span<TValue> Storage(T owner);

    internal override void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc) => type.Put(saver.File, Storage(owner)[index]);

    private protected void LoadElements(Span<TValue> values, VmStateLoader loader)
    {
        for (int i = 0; i < values.Length; i++)
        {
            loader.Path.Element(i);
            type.Get(loader, ref values[i]);
        }
    }
}

internal sealed class ArrayField<T, TValue>(string name, VmStateType<TValue> type, int num, VmStateSpan<T, TValue> storage, int since, Func<T, int, bool>? exists)
    : ValuesField<T, TValue>(name, type, since, exists) where T : class
{
    public override int? Num => num;

    internal override int Count(T owner, VmStateSaver saver) => num;

    internal override Span<TValue> Storage(T owner) => storage(owner)[..num];

    internal override void Load(T owner, VmStateLoader loader) => LoadElements(Storage(owner), loader);
}

internal sealed class VarArrayField<T, TValue>(string name, VmStateType<TValue> type, Func<T, long> count, VmStateSpan<T, TValue> storage, int since,
    Func<T, int, bool>? exists) : ValuesField<T, TValue>(name, type, since, exists) where T : class
{
    internal override int Count(T owner, VmStateSaver saver) => saver.Checked(count(owner), storage(owner).Length, "elements");

    internal override Span<TValue> Storage(T owner) => storage(owner);

    internal override void Load(T owner, VmStateLoader loader)
    {
        Span<TValue> all = storage(owner);
        LoadElements(all[..loader.Checked(count(owner), all.Length, "elements")], loader);
    }
}

internal sealed class VarArrayAllocField<T, TValue>(string name, VmStateType<TValue> type, Func<T, long> count, int max, VmStateRef<T, TValue[]> storage, int since,
    Func<T, int, bool>? exists) : ValuesField<T, TValue>(name, type, since, exists) where T : class
{
    internal override int Count(T owner, VmStateSaver saver) => saver.Checked(count(owner), storage(owner).Length, "elements");

    internal override Span<TValue> Storage(T owner) => storage(owner);

    internal override void Load(T owner, VmStateLoader loader)
    {
        var values = new TValue[loader.Checked(count(owner), max, "elements")];
        LoadElements(values, loader);
        storage(owner) = values;
    }
}

internal sealed class BufferField<T>(string name, int sizeBytes, VmStateSpan<T, byte> storage, int since, Func<T, int, bool>? exists)
    : VmStateField<T>(name, "buffer", sizeBytes, since, exists) where T : class
{
    internal override int Count(T owner, VmStateSaver saver) => 1;

    internal override void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc) => saver.File.Write(storage(owner)[..SizeBytes]);

    internal override void Load(T owner, VmStateLoader loader) => loader.File.Read(storage(owner)[..SizeBytes]);
}

internal sealed class VBufferField<T>(string name, Func<T, long> sizeBytes, VmStateSpan<T, byte> storage, int since, Func<T, int, bool>? exists)
    : VmStateField<T>(name, "buffer", 0, since, exists) where T : class
{
    internal override int Count(T owner, VmStateSaver saver) => 1;

    internal override void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc)
    {
        Span<byte> all = storage(owner);
        saver.File.Write(all[..saver.Checked(sizeBytes(owner), all.Length, "bytes")]);
    }

    internal override void Load(T owner, VmStateLoader loader)
    {
        Span<byte> all = storage(owner);
        loader.File.Read(all[..loader.Checked(sizeBytes(owner), all.Length, "bytes")]);
    }
}

internal sealed class VBufferAllocField<T>(string name, Func<T, long> sizeBytes, int maxBytes, VmStateRef<T, byte[]> storage, int since, Func<T, int, bool>? exists)
    : VmStateField<T>(name, "buffer", 0, since, exists) where T : class
{
    internal override int Count(T owner, VmStateSaver saver) => 1;

    internal override void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc)
    {
        byte[] all = storage(owner);
        saver.File.Write(all.AsSpan(0, saver.Checked(sizeBytes(owner), all.Length, "bytes")));
    }

    internal override void Load(T owner, VmStateLoader loader)
    {
        var bytes = new byte[loader.Checked(sizeBytes(owner), maxBytes, "bytes")];
        loader.File.Read(bytes);
        storage(owner) = bytes;
    }
}

internal sealed class BitmapField<T>(string name, Func<T, long> bits, VmStateSpan<T, ulong> storage, int since, Func<T, int, bool>? exists)
    : VmStateField<T>(name, "bitmap", 0, since, exists) where T : class
{
    internal override int Count(T owner, VmStateSaver saver) => 1;

    internal override void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc)
    {
        Span<ulong> all = storage(owner);
        foreach (ulong word in all[..Words(saver.Checked(bits(owner), all.Length * 64L, "bits"))]) saver.File.WriteUInt64(word);
    }

    internal override void Load(T owner, VmStateLoader loader)
    {
        Span<ulong> all = storage(owner);
        foreach (ref ulong word in all[..Words(loader.Checked(bits(owner), all.Length * 64L, "bits"))]) word = loader.File.ReadUInt64();
    }

    private static int Words(int bits) => (int)(((long)bits + 63) / 64);
}
