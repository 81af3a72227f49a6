using Vmm.Core.SaveVm;

namespace Vmm.Core.VmStates;

/// <summary>A description without its owner's type: what <see cref="VmStateDump"/> and stream viewers need. Immutable.</summary>
public interface IVmStateDescription
{
    /// <summary>Name; a subsection's name starts with its parent's.</summary>
    string Name { get; }

    /// <summary>Version written (QEMU: <c>version_id</c>).</summary>
    int VersionId { get; }

    /// <summary>Oldest version that loads (QEMU: <c>minimum_version_id</c>).</summary>
    int MinimumVersionId { get; }

    /// <summary>Sent before the START sections (QEMU: <c>early_setup</c>).</summary>
    bool IsEarlySetup { get; }

    /// <summary>The state can never migrate (QEMU: <c>unmigratable</c>).</summary>
    bool IsUnmigratable { get; }

    /// <summary>Save order.</summary>
    MigrationPriority Priority { get; }

    /// <summary>Fields in wire order.</summary>
    internal IReadOnlyList<IVmStateFieldInfo> Fields { get; }

    /// <summary>Subsections in wire order.</summary>
    IReadOnlyList<IVmStateDescription> Subsections { get; }
}

/// <summary>A field without its owner's type (QEMU: <c>VMStateField</c>). Immutable.</summary>
internal interface IVmStateFieldInfo
{
    /// <summary>Name as in VMDESC.</summary>
    string Name { get; }

    /// <summary>Type name as in VMDESC, e.g. <c>uint32</c> (stream 2.1).</summary>
    string TypeName { get; }

    /// <summary>First version that has the field (QEMU: <c>version_id</c>); 0 for always.</summary>
    int VersionId { get; }

    /// <summary>A predicate decides about presence, not the version (QEMU: <c>field_exists</c>).</summary>
    bool HasFieldExists { get; }

    /// <summary>Number of elements of a fixed array (QEMU: <c>num</c> with VMS_ARRAY), or null.</summary>
    int? Num { get; }

    /// <summary>Bytes of one element in memory, by QEMU's reckoning; 0 where only run time knows.</summary>
    int SizeBytes { get; }

    /// <summary>The nested description, or null.</summary>
    IVmStateDescription? Description { get; }

    /// <summary>Pseudo-field of zero bytes whose predicate must hold (QEMU: VMS_MUST_EXIST).</summary>
    bool IsMustExist { get; }
}
