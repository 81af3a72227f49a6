using Vmm.Core.Errors;
using Vmm.Core.RunStates;

namespace Vmm.Core.SaveVm;

/// <summary>Save order: higher first, equal ones in order of registration (QEMU: <c>MigrationPriority</c>).</summary>
public enum MigrationPriority
{
    /// <summary>After everything else.</summary>
    Low = -1,
    /// <summary>Most devices.</summary>
    Default = 0,
    /// <summary>IOMMUs.</summary>
    Iommu = 1,
    /// <summary>PCI buses.</summary>
    PciBus = 2,
    /// <summary>virtio-mem.</summary>
    VirtioMem = 3,
    /// <summary>Local interrupt controllers.</summary>
    Apic = 4,
    /// <summary>GICv3 ITS.</summary>
    GicV3Its = 5,
    /// <summary>GICv3.</summary>
    GicV3 = 6,
}

/// <summary>Identity and order of one entry of the registry.</summary>
public sealed record SaveVmRegistration
{
    /// <summary><see cref="InstanceId"/> value that asks for one more than the highest id of that name, or 0 (QEMU: <c>VMSTATE_INSTANCE_ID_ANY</c>).</summary>
    public const int AnyInstance = -1;

    /// <summary>Section name, 1 to 255 printable ASCII characters; <c>path/name</c> for devices on a bus with a path.</summary>
    public required string IdStr { get; init; }

    /// <summary>Instance id, or <see cref="AnyInstance"/>.</summary>
    public int InstanceId { get; init; } = AnyInstance;

    /// <summary>Another instance id that also loads into this entry, or -1.</summary>
    public int AliasId { get; init; } = -1;

    /// <summary>Bare name under which very old streams know a path-qualified entry, or null (QEMU: <c>compat</c>).</summary>
    public string? CompatIdStr { get; init; }

    /// <summary>Version written in section headers.</summary>
    public int VersionId { get; init; } = 1;

    /// <summary>Oldest version that loads; equal to <see cref="VersionId"/> for handlers that check themselves.</summary>
    public int MinimumVersionId { get; init; }

    /// <summary>Save order.</summary>
    public MigrationPriority Priority { get; init; }
}

/// <summary>One registered section. Immutable.</summary>
public sealed class SaveVmEntry
{
    internal SaveVmEntry(uint sectionId, SaveVmRegistration registration, int instanceId, int compatInstanceId, SaveVmHandlers? handlers, IVmStateSection? vmState)
    {
        SectionId = sectionId;
        Registration = registration;
        InstanceId = instanceId;
        CompatInstanceId = compatInstanceId;
        Handlers = handlers;
        VmState = vmState;
    }

    /// <summary>Id in streams written here; unique, by order of registration.</summary>
    public uint SectionId { get; }

    /// <summary>As registered.</summary>
    public SaveVmRegistration Registration { get; }

    /// <summary>Section name.</summary>
    public string IdStr => Registration.IdStr;

    /// <summary>The instance id in streams written here.</summary>
    public int InstanceId { get; }

    /// <summary>Instance id under <see cref="SaveVmRegistration.CompatIdStr"/>; -1 without such a name.</summary>
    public int CompatInstanceId { get; }

    /// <summary>Version written.</summary>
    public int VersionId => VmState?.VersionId ?? Registration.VersionId;

    /// <summary>Oldest version that loads.</summary>
    public int MinimumVersionId => VmState?.MinimumVersionId ?? Registration.MinimumVersionId;

    /// <summary>Roles, or null for a declared state.</summary>
    public SaveVmHandlers? Handlers { get; }

    /// <summary>Declared state, or null for roles.</summary>
    public IVmStateSection? VmState { get; }

    /// <inheritdoc/>
    public override string ToString() => $"{IdStr}/{InstanceId}";
}

/// <summary>
/// The sections of one VM in save order. Thread-safe: every call takes the BQL (QEMU: <c>savevm_state</c>).
/// </summary>
/// <param name="bql">The VM's lock.</param>
public sealed class SaveVmRegistry(Bql bql)
{
    private readonly List<SaveVmEntry> _entries = [];
    private uint _nextSectionId;

    /// <summary>The VM's lock.</summary>
    public Bql Bql => bql;

    /// <summary>Registers roles (QEMU: <c>register_savevm_live</c>).</summary>
    /// <param name="registration">Identity.</param>
    /// <param name="handlers">Roles.</param>
    /// <returns>Dispose to unregister.</returns>
    /// <exception cref="ConfigurationException">The identity is in use or malformed.</exception>
    public IDisposable Register(SaveVmRegistration registration, SaveVmHandlers handlers)
    {
        ArgumentNullException.ThrowIfNull(handlers);
        return Add(registration, handlers, null);
    }

    /// <summary>Registers a declared state (QEMU: <c>vmstate_register</c>).</summary>
    /// <param name="registration">Identity; its versions are ignored, the state has its own.</param>
    /// <param name="state">The bound description.</param>
    /// <returns>Dispose to unregister.</returns>
    /// <exception cref="ConfigurationException">The identity is in use or malformed.</exception>
    public IDisposable Register(SaveVmRegistration registration, IVmStateSection state)
    {
        ArgumentNullException.ThrowIfNull(state);
        return Add(registration, null, state);
    }

    /// <summary>Uses up a section id without registering anything, so that ids equal those of a QEMU that has a section which we lack.</summary>
    public void ReserveSectionId()
    {
        using (bql.Acquire()) _nextSectionId++;
    }

    /// <summary>A copy of all entries, in save order.</summary>
    public IReadOnlyList<SaveVmEntry> Entries()
    {
        using (bql.Acquire()) return [.. _entries];
    }

    /// <summary>
    /// Finds the entry of an incoming section by its name and instance id, or null (stream 1.5). Aliases and the bare names of path-qualified entries count too.
    /// </summary>
    public SaveVmEntry? Find(string idStr, int instanceId)
    {
        using (bql.Acquire())
        {
            return _entries.Find(e => e.IdStr == idStr && (e.InstanceId == instanceId || (e.Registration.AliasId >= 0 && e.Registration.AliasId == instanceId)))
                ?? _entries.Find(e => e.Registration.CompatIdStr == idStr
                    && (e.CompatInstanceId == instanceId || (e.Registration.AliasId >= 0 && e.Registration.AliasId == instanceId)));
        }
    }

    private Registration Add(SaveVmRegistration registration, SaveVmHandlers? handlers, IVmStateSection? state)
    {
        ArgumentNullException.ThrowIfNull(registration);
        string id = registration.IdStr;
        if (id.Length is 0 or > 255 || id.Any(static c => c is < ' ' or > '~'))
            throw new ConfigurationException($"section name '{id}' must be 1 to 255 printable ASCII characters");
        using (bql.Acquire())
        {
            int instance = registration.InstanceId;
            if (instance == SaveVmRegistration.AnyInstance)
                instance = _entries.Where(e => e.IdStr == id).Select(static e => e.InstanceId + 1).DefaultIfEmpty(0).Max();
            else if (_entries.Exists(e => e.IdStr == id && e.InstanceId == instance))
                throw new ConfigurationException($"section '{id}' instance {instance} is registered already");
            int compat = registration.CompatIdStr is { } bare ? _entries.Count(e => e.Registration.CompatIdStr == bare) : -1;
            var entry = new SaveVmEntry(_nextSectionId++, registration, instance, compat, handlers, state);
            int at = _entries.FindIndex(e => e.Registration.Priority < registration.Priority);
            if (at < 0) _entries.Add(entry);
            else _entries.Insert(at, entry);
            return new Registration(() => { using (bql.Acquire()) _entries.Remove(entry); });
        }
    }
}
