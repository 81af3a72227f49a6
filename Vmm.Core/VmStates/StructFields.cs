using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Core.VmStates;

/// <summary>How VMDESC shows a nested description, and in which version it loads.</summary>
internal enum StructForm
{
    /// <summary>An object of its own in VMDESC; loads in the version of the nested description.</summary>
    Struct,
    /// <summary>Inline in VMDESC; loads in the version that the field names.</summary>
    VStruct,
    /// <summary>Inline in VMDESC; saved in the version of the nested description, loaded in the field's version.</summary>
    Tmp,
}

/// <summary>A field whose elements have a description.</summary>
internal abstract class NestedField<T, TNested>(string name, string typeName, int sizeBytes, VmStateDescription<TNested> description, int since,
    Func<T, int, bool>? exists) : VmStateField<T>(name, typeName, sizeBytes, since, exists) where T : class where TNested : class
{
    public override IVmStateDescription Description => description;

    private protected VmStateDescription<TNested> Nested => description;

    private protected void SaveStruct(TNested nested, VmStateSaver saver, VmDescJson? desc)
    {
        desc?.StartObject("struct");
        description.Save(nested, saver, description.VersionId, desc, nested: true);
        desc?.EndObject();
    }

    private protected void LoadStruct(TNested nested, VmStateLoader loader) => description.Load(nested, loader, description.VersionId, nested: true);

    /// <summary>QEMU looks only into fields of the form struct; it does not mark the other forms.</summary>
    private protected bool NestedCanCompress => description.Subsections.Count == 0 && description.Fields.All(static f => f.CanCompress);

    private protected static int SizeOf(IVmStateDescription description)
    {
        // A null here usually means that a static description is declared below the one that nests it.
        ArgumentNullException.ThrowIfNull(description);
        return description.Fields.Sum(static f => f.SizeBytes * (f.Num ?? 1));
    }
}

internal sealed class StructField<T, TNested>(string name, StructForm form, VmStateDescription<TNested> description, int? structVersionId,
    Func<T, TNested> member, int since, Func<T, int, bool>? exists)
    : NestedField<T, TNested>(name, TypeNameOf(form), SizeOf(description), description, since, exists) where T : class where TNested : class
{
    internal override bool CanCompress => base.CanCompress && (form != StructForm.Struct || NestedCanCompress);

    internal override int Count(T owner, VmStateSaver saver) => 1;

    internal override void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc)
    {
        if (form == StructForm.Struct) SaveStruct(member(owner), saver, desc);
        else Nested.Save(member(owner), saver, structVersionId ?? Nested.VersionId, desc, nested: true);
    }

    internal override void Load(T owner, VmStateLoader loader)
    {
        int version = form switch
        {
            StructForm.VStruct => structVersionId!.Value,
            StructForm.Tmp => VersionId,
            _ => Nested.VersionId,
        };
        Nested.Load(member(owner), loader, version, nested: true);
    }

    private static string TypeNameOf(StructForm form) => form switch
    {
        StructForm.VStruct => "vstruct",
        StructForm.Tmp => "tmp",
        _ => "struct",
    };
}

internal sealed class StructArrayField<T, TNested>(string name, VmStateDescription<TNested> description, int? num, Func<T, long> count,
    Func<T, IReadOnlyList<TNested>> storage, int since, Func<T, int, bool>? exists)
    : NestedField<T, TNested>(name, "struct", SizeOf(description), description, since, exists) where T : class where TNested : class
{
    public override int? Num => num;

    internal override bool CanCompress => base.CanCompress && NestedCanCompress;

    internal override int Count(T owner, VmStateSaver saver) => num ?? saver.Checked(count(owner), storage(owner).Count, "elements");

    internal override void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc) => SaveStruct(storage(owner)[index], saver, desc);

    internal override void Load(T owner, VmStateLoader loader)
    {
        IReadOnlyList<TNested> all = storage(owner);
        int n = num ?? loader.Checked(count(owner), all.Count, "elements");
        for (int i = 0; i < n; i++)
        {
            loader.Path.Element(i);
            LoadStruct(all[i], loader);
        }
    }
}

internal sealed class StructVarArrayAllocField<T, TNested>(string name, VmStateDescription<TNested> description, Func<T, long> count, int max,
    Func<T, TNested> create, VmStateRef<T, TNested[]> storage, int since, Func<T, int, bool>? exists)
    : NestedField<T, TNested>(name, "struct", SizeOf(description), description, since, exists) where T : class where TNested : class
{
    internal override bool CanCompress => base.CanCompress && NestedCanCompress;

    internal override int Count(T owner, VmStateSaver saver) => saver.Checked(count(owner), storage(owner).Length, "elements");

    internal override void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc) => SaveStruct(storage(owner)[index], saver, desc);

    internal override void Load(T owner, VmStateLoader loader)
    {
        var all = new TNested[loader.Checked(count(owner), max, "elements")];
        for (int i = 0; i < all.Length; i++)
        {
            loader.Path.Element(i);
            LoadStruct(all[i] = create(owner), loader);
        }
        storage(owner) = all;
    }
}

internal sealed class PointerArrayField<T, TNested>(string name, VmStateDescription<TNested> description, int num, Func<T, IReadOnlyList<TNested?>> storage,
    int since, Func<T, int, bool>? exists) : NestedField<T, TNested>(name, "struct", PointerBytes, description, since, exists) where T : class where TNested : class
{
    internal const int PointerBytes = 8;

    public override int? Num => num;

    internal override bool CanCompress => base.CanCompress && NestedCanCompress;

    internal override int Count(T owner, VmStateSaver saver) => num;

    internal override bool IsNull(T owner, int index) => storage(owner)[index] is null;

    internal override void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc) => SaveStruct(storage(owner)[index]!, saver, desc);

    internal override void Load(T owner, VmStateLoader loader)
    {
        IReadOnlyList<TNested?> all = storage(owner);
        for (int i = 0; i < num; i++)
        {
            loader.Path.Element(i);
            if (all[i] is { } element)
            {
                LoadStruct(element, loader);
                continue;
            }
            long at = loader.File.Position;
            byte marker = loader.File.ReadByte();
            if (marker != VmStatePointers.Null) throw loader.Bad(at, "0x30, because the local element is null", $"0x{marker:x2}");
        }
    }
}

internal sealed class PointerArrayAutoAllocField<T, TNested>(string name, VmStateDescription<TNested> description, int num, Func<T, TNested> create,
    Func<T, TNested?[]> storage, int since, Func<T, int, bool>? exists)
    : NestedField<T, TNested>(name, "struct", PointerArrayField<T, TNested>.PointerBytes, description, since, exists) where T : class where TNested : class
{
    public override int? Num => num;

    internal override bool HasPresenceBytes => true;

    internal override bool CanCompress => false;

    internal override int Count(T owner, VmStateSaver saver) => num;

    internal override bool IsNull(T owner, int index) => storage(owner)[index] is null;

    internal override void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc) => SaveStruct(storage(owner)[index]!, saver, desc);

    internal override void Load(T owner, VmStateLoader loader)
    {
        TNested?[] all = storage(owner);
        for (int i = 0; i < num; i++)
        {
            loader.Path.Element(i);
            long at = loader.File.Position;
            byte marker = loader.File.ReadByte();
            if (marker is not (VmStatePointers.Null or VmStatePointers.Present)) throw loader.Bad(at, "0x30 or 0x31", $"0x{marker:x2}");
            all[i] = null;
            if (marker == VmStatePointers.Null) continue;
            TNested element = create(owner);
            LoadStruct(element, loader);
            all[i] = element;
        }
    }
}

internal sealed class ListField<T, TNested>(string name, string typeName, VmStateDescription<TNested> description, Func<T, List<TNested>> list,
    Func<T, TNested> create, int max, int since, Func<T, int, bool>? exists)
    : NestedField<T, TNested>(name, typeName, SizeOf(description), description, since, exists) where T : class where TNested : class
{
    internal override int Count(T owner, VmStateSaver saver) => 1;

    internal override void SaveElement(T owner, int index, VmStateSaver saver, VmDescJson? desc)
    {
        foreach (TNested element in list(owner))
        {
            saver.File.WriteByte(1);
            Nested.Save(element, saver, Nested.VersionId, desc, nested: true);
        }
        saver.File.WriteByte(0);
    }

    internal override void Load(T owner, VmStateLoader loader)
    {
        if (VersionId > Nested.VersionId || VersionId < Nested.MinimumVersionId)
            throw loader.Incompatible(loader.File.Position, "list version", $"version {Nested.MinimumVersionId} to {Nested.VersionId}", $"version {VersionId}");
        var loaded = new List<TNested>();
        // QEMU reads every byte other than 0 as the start of another element.
        while (loader.File.ReadByte() != 0)
        {
            loader.Path.Element(loaded.Count);
            loader.Checked(loaded.Count + 1, max, "elements");
            TNested element = create(owner);
            Nested.Load(element, loader, VersionId, nested: true);
            loaded.Add(element);
        }
        List<TNested> target = list(owner);
        target.Clear();
        target.AddRange(loaded);
    }
}
