using Vmm.Core.SaveVm;

namespace Vmm.Core.VmStates;

/// <summary>A description without the type of its owner, for <see cref="VmStateDump"/> and stream viewers. Immutable.</summary>
public interface IVmStateDescription
{
    /// <summary>Name; the name of a subsection starts with its parent's name.</summary>
    string Name { get; }

    /// <summary>The version that a save writes (QEMU: <c>version_id</c>).</summary>
    int VersionId { get; }

    /// <summary>The oldest version that loads (QEMU: <c>minimum_version_id</c>).</summary>
    int MinimumVersionId { get; }

    /// <summary>True if the section is sent before the START sections (QEMU: <c>early_setup</c>).</summary>
    bool IsEarlySetup { get; }

    /// <summary>True if the state can never migrate (QEMU: <c>unmigratable</c>).</summary>
    bool IsUnmigratable { get; }

    /// <summary>Sections with a higher priority are saved first.</summary>
    MigrationPriority Priority { get; }

    /// <summary>Fields in wire order.</summary>
    internal IReadOnlyList<IVmStateFieldInfo> Fields { get; }

    /// <summary>Subsections in wire order.</summary>
    IReadOnlyList<IVmStateDescription> Subsections { get; }
}

/// <summary>A field without the type of its owner (QEMU: <c>VMStateField</c>). Immutable.</summary>
internal interface IVmStateFieldInfo
{
    /// <summary>Name in VMDESC.</summary>
    string Name { get; }

    /// <summary>Type name in VMDESC, e.g. <c>uint32</c> (stream 2.1).</summary>
    string TypeName { get; }

    /// <summary>The first version with the field (QEMU: <c>version_id</c>); 0 if all versions have it.</summary>
    int VersionId { get; }

    /// <summary>True if a predicate, not the version, decides whether the field is present (QEMU: <c>field_exists</c>).</summary>
    bool HasFieldExists { get; }

    /// <summary>Number of elements of a fixed array (QEMU: <c>num</c> with VMS_ARRAY); null for other fields.</summary>
    int? Num { get; }

    /// <summary>Bytes of one element in memory, as QEMU counts them; 0 if only the running device knows.</summary>
    int SizeBytes { get; }

    /// <summary>The nested description, or null.</summary>
    IVmStateDescription? Description { get; }

    /// <summary>True for a field of zero bytes whose predicate must hold (QEMU: VMS_MUST_EXIST).</summary>
    bool IsMustExist { get; }
}
