using System.Text;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;

namespace Vmm.Core.VmStates;

// body       = field* subsection*                      (the stream carries neither names nor lengths of fields; stream 2.2, 2.3)
// subsection = 05 u8:n byte[n]:name u32:version body   (stream 2.4)
public sealed partial class VmStateDescription<T>
{
    private const byte SubsectionType = 5;

    /// <summary>QEMU: <c>vmstate_save_state_v</c>.</summary>
    internal void Save(T owner, VmStateSaver saver, int version, VmDescJson? desc, bool nested)
    {
        saver.Path.EnterDescription(Name, nested);
        if (PreSave is { } preSave) saver.Hook("pre_save", () => preSave(owner));
        try
        {
            desc?.Member("vmsd_name", Name);
            desc?.Member("version", version);
            desc?.StartArray("fields");
            foreach (VmStateField<T> field in Fields) SaveField(field, owner, saver, version, desc);
            desc?.EndArray();
            SaveSubsections(owner, saver, desc);
        }
        catch (Exception e)
        {
            RunPostSaveAfter(e, owner, saver);
            throw;
        }
        if (PostSave is { } postSave) saver.Hook("post_save", () => postSave(owner));
        saver.Path.LeaveDescription();
    }

    /// <summary>QEMU: <c>vmstate_load_state</c>.</summary>
    internal void Load(T owner, VmStateLoader loader, int version, bool nested)
    {
        loader.Path.EnterDescription(Name, nested);
        if (version > VersionId)
            throw loader.Incompatible(loader.File.Position, "too new", $"version {VersionId} or older", $"version {version}");
        if (version < MinimumVersionId)
            throw loader.Incompatible(loader.File.Position, "too old", $"version {MinimumVersionId} or newer", $"version {version}");
        if (PreLoad is { } preLoad) loader.Hook("pre_load", () => preLoad(owner));
        foreach (VmStateField<T> field in Fields)
        {
            loader.Path.EnterField(field.Name);
            if (field.IsPresent(owner, version)) field.Load(owner, loader);
            else if (field.IsMustExist) throw loader.Bad(loader.File.Position, "state that passes validation", "state that does not");
            loader.Path.Leave();
        }
        LoadSubsections(owner, loader);
        if (PostLoad is { } postLoad) loader.Hook("post_load", () => postLoad(owner, version));
        loader.Path.LeaveDescription();
    }

    /// <summary>Runs the hook after a failure too, because it undoes <see cref="PreSave"/>; if it fails as well, the exception reports both failures.</summary>
    private void RunPostSaveAfter(Exception first, T owner, VmStateSaver saver)
    {
        try
        {
            PostSave?.Invoke(owner);
        }
        catch (Exception second) when (second is not OperationCanceledException)
        {
            throw new DeviceStateException($"{first.Message}; then post_save of '{Name}' failed: {second.Message}", first);
        }
    }

    private void SaveField(VmStateField<T> field, T owner, VmStateSaver saver, int version, VmDescJson? desc)
    {
        saver.Path.EnterField(field.Name);
        if (field.IsPresent(owner, version))
        {
            int count = field.Count(owner, saver);
            for (int i = 0, run; i < count; i += run)
            {
                run = desc is null ? count : RunLength(field, owner, i, count, desc);
                SaveRun(field, owner, saver, i, run, desc);
            }
        }
        else if (field.IsMustExist) throw new DeviceStateException($"cannot save '{saver.Path}': the state does not pass validation");
        saver.Path.Leave();
    }

    /// <summary>VMDESC describes a pointer array as runs of null elements and runs of others, each run like an array (stream 2.6).</summary>
    private static int RunLength(VmStateField<T> field, T owner, int start, int count, VmDescJson desc)
    {
        if (desc.Options.NullMarkerType is null) return count - start;
        bool isNull = field.IsNull(owner, start);
        int end = start + 1;
        while (end < count && field.IsNull(owner, end) == isNull) end++;
        return end - start;
    }

    private void SaveRun(VmStateField<T> field, T owner, VmStateSaver saver, int start, int run, VmDescJson? desc)
    {
        for (int i = start; i < start + run; i++)
        {
            if (start + run > 1) saver.Path.Element(i);
            if (field.IsNull(owner, i))
            {
                saver.File.WriteByte(VmStatePointers.Null);
                if (desc is not null) DescribePointer(field, desc, i, run, desc.Options.NullMarkerType);
            }
            else
            {
                if (field.HasPresenceBytes)
                {
                    saver.File.WriteByte(VmStatePointers.Present);
                    if (desc is not null) DescribePointer(field, desc, i, 1, VmDescOptions.Qemu111.NullMarkerType);
                }
                SaveElement(field, owner, saver, i, run, desc);
            }
            // VMDESC describes a compressed array by its first element.
            if (CanCompress(field) || (desc?.Options.NullMarkerType is not null && field.IsNull(owner, i))) desc = null;
        }
    }

    private static bool CanCompress(VmStateField<T> field) => field.CanCompress && !field.HasPresenceBytes;

    private void SaveElement(VmStateField<T> field, T owner, VmStateSaver saver, int index, int run, VmDescJson? desc)
    {
        if (desc is null)
        {
            field.SaveElement(owner, index, saver, null);
            return;
        }
        StartDescription(field, desc, index, run, field.TypeName, CanCompress(field));
        long at = saver.File.Position;
        field.SaveElement(owner, index, saver, desc);
        desc.Member("size", saver.File.Position - at);
        desc.EndObject();
    }

    private void DescribePointer(VmStateField<T> field, VmDescJson desc, int index, int run, string? marker)
    {
        StartDescription(field, desc, index, run, marker ?? field.TypeName, canCompress: marker is not null || CanCompress(field));
        if (marker is null && field.Description is not null)
        {
            desc.StartObject("struct");
            desc.EndObject();
        }
        desc.Member("size", 1);
        desc.EndObject();
    }

    /// <summary>QEMU: <c>vmsd_desc_field_start</c>.</summary>
    private void StartDescription(VmStateField<T> field, VmDescJson desc, int index, int run, string type, bool canCompress)
    {
        desc.StartObject();
        desc.Member("name", UniqueName(field));
        if (run > 1 && canCompress) desc.Member("array_len", run);
        else if (run > 1 && desc.Options.WriteIndex) desc.Member("index", index);
        desc.Member("type", type);
    }

    private string UniqueName(VmStateField<T> field)
    {
        int before = 0, all = 0;
        foreach (VmStateField<T> f in Fields)
        {
            if (f.Name != field.Name) continue;
            if (ReferenceEquals(f, field)) before = all;
            all++;
        }
        return all > 1 ? $"{field.Name}[{before}]" : field.Name;
    }

    private void SaveSubsections(T owner, VmStateSaver saver, VmDescJson? desc)
    {
        bool any = false;
        foreach (VmStateDescription<T> sub in Subsections)
        {
            if (!sub.IsNeeded(owner)) continue;
            if (!any) desc?.StartArray("subsections");
            any = true;
            desc?.StartObject();
            saver.File.WriteByte(SubsectionType);
            saver.File.WriteCountedString(sub.Name);
            saver.File.WriteInt32(sub.VersionId);
            sub.Save(owner, saver, sub.VersionId, desc, nested: false);
            desc?.EndObject();
        }
        if (any) desc?.EndArray();
    }

    /// <summary>
    /// Reads the subsections whose names extend this description's name, and leaves any other for an outer description (stream 2.4; QEMU:
    /// <c>vmstate_subsection_load</c>).
    /// </summary>
    private void LoadSubsections(T owner, VmStateLoader loader)
    {
        while (true)
        {
            ReadOnlySpan<byte> head = loader.File.Peek(2);
            if (head.Length < 2 || head[0] != SubsectionType) return;
            int length = head[1];
            if (length < Name.Length + 1) return;
            ReadOnlySpan<byte> peeked = loader.File.Peek(2 + length);
            if (peeked.Length < 2 + length) return;
            string name = Encoding.Latin1.GetString(peeked[2..]);
            if (!name.StartsWith(Name, StringComparison.Ordinal)) return;
            VmStateDescription<T> sub = Subsections.FirstOrDefault(s => s.Name == name)
                ?? throw loader.Incompatible(loader.File.Position, "unknown subsection", Subsections.Count == 0 ? "none" : string.Join(" or ", Subsections.Select(static s => $"'{s.Name}'")), $"'{name}'");
            loader.File.Skip(2 + length);
            // QEMU keeps only 8 bits of a subsection's version.
            sub.Load(owner, loader, (byte)loader.File.ReadUInt32(), nested: false);
        }
    }
}
