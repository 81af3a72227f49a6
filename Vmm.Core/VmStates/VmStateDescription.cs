using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Core.VmStates;

/// <summary>
/// The declared state of a type: name, versions, ordered fields and subsections, hooks. One declaration serves save, load, VMDESC and
/// <see cref="VmStateDump"/>. Declare it as a static member of the owner, so that its accessors reach private fields. Immutable. Hooks run on the
/// thread that saves or loads, with the BQL held, and report a failure by throwing: the save or load then fails with a
/// <see cref="DeviceStateException"/> that names the hook (QEMU: <c>VMStateDescription</c>; stream 2).
/// </summary>
public sealed partial class VmStateDescription<T> : IVmStateDescription where T : class
{
    /// <inheritdoc/>
    public required string Name { get; init; }

    /// <inheritdoc/>
    public int VersionId { get; init; } = 1;

    /// <inheritdoc/>
    public int MinimumVersionId { get; init; } = 1;

    /// <summary>Fields in wire order.</summary>
    public IReadOnlyList<VmStateField<T>> Fields { get; init; } = [];

    /// <summary>Subsections in wire order; a save sends each one only if its <see cref="Needed"/> is true.</summary>
    public IReadOnlyList<VmStateDescription<T>> Subsections { get; init; } = [];

    /// <summary>Tells whether a save sends this section or subsection; null for always. Called before <see cref="PreSave"/>.</summary>
    public Func<T, bool>? Needed { get; init; }

    /// <summary>Runs before the first field is written (QEMU: <c>pre_save</c>).</summary>
    public Action<T>? PreSave { get; init; }

    /// <summary>
    /// Runs after the last subsection, even if a field or a subsection failed, but not if <see cref="PreSave"/> failed (QEMU: <c>post_save</c>).
    /// </summary>
    public Action<T>? PostSave { get; init; }

    /// <summary>Runs before the first field is read, to set defaults for fields and subsections that may be absent (QEMU: <c>pre_load</c>).</summary>
    public Action<T>? PreLoad { get; init; }

    /// <summary>Runs after the last subsection and gets the incoming version; checks values (QEMU: <c>post_load</c>).</summary>
    public Action<T, int>? PostLoad { get; init; }

    /// <inheritdoc/>
    public bool IsEarlySetup { get; init; }

    /// <inheritdoc/>
    public bool IsUnmigratable { get; init; }

    /// <inheritdoc/>
    public MigrationPriority Priority { get; init; }

    IReadOnlyList<IVmStateFieldInfo> IVmStateDescription.Fields => Fields;

    IReadOnlyList<IVmStateDescription> IVmStateDescription.Subsections => Subsections;

    /// <summary>Binds the description to an owner, which gives a section for the registry (QEMU: <c>vmstate_register</c>).</summary>
    /// <exception cref="ArgumentException">The description violates a rule of the format; the message names the rule.</exception>
    public IVmStateSection Bind(T owner)
    {
        ArgumentNullException.ThrowIfNull(owner);
        VmStateRules.Check(this);
        return new Section(this, owner);
    }

    internal bool IsNeeded(T owner) => Needed is null || Needed(owner);

    private sealed class Section(VmStateDescription<T> description, T owner) : IVmStateSection
    {
        public string Name => description.Name;

        public int VersionId => description.VersionId;

        public int MinimumVersionId => description.MinimumVersionId;

        public bool IsEarlySetup => description.IsEarlySetup;

        public bool IsMigratable => !description.IsUnmigratable;

        public bool IsNeeded() => description.IsNeeded(owner);

        public void Save(QemuFileWriter f, VmDescJson? desc)
        {
            ArgumentNullException.ThrowIfNull(f);
            description.Save(owner, new VmStateSaver(f), description.VersionId, desc, nested: false);
        }

        public void Load(QemuFileReader f, int versionId)
        {
            ArgumentNullException.ThrowIfNull(f);
            var loader = new VmStateLoader(f);
            try
            {
                description.Load(owner, loader, versionId, nested: false);
            }
            catch (StreamTruncatedException e)
            {
                throw new StreamTruncatedException($"field '{loader.Path}' is cut short", e) { Offset = e.Offset };
            }
        }
    }
}

/// <summary>Rules that a description must follow so that this reader and QEMU's can load it (stream 2.4).</summary>
internal static class VmStateRules
{
    internal static void Check(IVmStateDescription description) => Check(description, []);

    private static void Check(IVmStateDescription d, HashSet<IVmStateDescription> seen)
    {
        // A description may be nested in several others; one check is enough.
        if (!seen.Add(d)) return;
        CheckName(d.Name);
        if (d.MinimumVersionId > d.VersionId || d.MinimumVersionId < 0)
            throw new ArgumentException($"description '{d.Name}': minimum version {d.MinimumVersionId} is outside 0 to {d.VersionId}");
        foreach (IVmStateFieldInfo field in d.Fields)
        {
            CheckName(field.Name);
            if (field.Description is { } nested) Check(nested, seen);
        }
        var names = new HashSet<string>(StringComparer.Ordinal);
        foreach (IVmStateDescription sub in d.Subsections)
        {
            if (!sub.Name.StartsWith(d.Name, StringComparison.Ordinal) || sub.Name.Length == d.Name.Length)
                throw new ArgumentException($"subsection '{sub.Name}' of '{d.Name}' must have a name that extends its parent's");
            if (!names.Add(sub.Name)) throw new ArgumentException($"description '{d.Name}' has two subsections '{sub.Name}'");
            if (sub.VersionId > byte.MaxValue) throw new ArgumentException($"subsection '{sub.Name}': readers keep 8 bits of version {sub.VersionId}");
            Check(sub, seen);
        }
        CheckPrefixes(d);
    }

    /// <summary>
    /// A reader finds the subsections of a description by name prefix alone. If the body of <c>a/b</c> ends directly before the subsection <c>a/bc</c>,
    /// the reader of <c>a/b</c> takes it for its own and fails. QEMU reads the same way, so such a stream would load nowhere.
    /// </summary>
    private static void CheckPrefixes(IVmStateDescription d)
    {
        var readBefore = new List<IVmStateDescription>();
        AddLastField(d, readBefore);
        foreach (IVmStateDescription sub in d.Subsections)
        {
            if (readBefore.Find(e => sub.Name.StartsWith(e.Name, StringComparison.Ordinal)) is { } taker)
                throw new ArgumentException($"subsection '{sub.Name}' of '{d.Name}' would be taken for one of '{taker.Name}', which is read before it");
            AddTail(sub, readBefore);
        }
    }

    /// <summary>Adds all descriptions that look for subsections at the end of this description's body.</summary>
    private static void AddTail(IVmStateDescription d, List<IVmStateDescription> into)
    {
        into.Add(d);
        AddLastField(d, into);
        foreach (IVmStateDescription sub in d.Subsections) AddTail(sub, into);
    }

    private static void AddLastField(IVmStateDescription d, List<IVmStateDescription> into)
    {
        // A list ends with a byte of its own, so its elements do not look for subsections there.
        if (d.Fields is [.., { Description: { } nested, TypeName: not ("qtailq" or "qlist") }]) AddTail(nested, into);
    }

    private static void CheckName(string name)
    {
        if (name.Length is 0 or > byte.MaxValue || name.Any(static c => c is < ' ' or > '~'))
            throw new ArgumentException($"name '{name}' must be 1 to 255 printable ASCII characters");
    }
}
