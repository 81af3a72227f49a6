using Vmm.Core.Wire;

namespace Vmm.Core.SaveVm;

/// <summary>
/// A declared device state bound to its owner: what a FULL section of a VMState description needs. Made by
/// <c>VmStateDescription&lt;T&gt;.Bind</c> (QEMU: <c>vmstate_register</c>).
/// </summary>
public interface IVmStateSection
{
    /// <summary>Name of the description, e.g. <c>serial</c>.</summary>
    string Name { get; }

    /// <summary>Version written.</summary>
    int VersionId { get; }

    /// <summary>Oldest version that loads.</summary>
    int MinimumVersionId { get; }

    /// <summary>Sent before the START sections (QEMU: <c>early_setup</c>).</summary>
    bool IsEarlySetup { get; }

    /// <summary>False if the state exists but can never migrate (QEMU: <c>unmigratable</c>).</summary>
    bool IsMigratable { get; }

    /// <summary>Whether the section is sent at all. BQL: held.</summary>
    /// <returns>The description's <c>needed</c>.</returns>
    bool IsNeeded();

    /// <summary>Writes fields and subsections. BQL: held.</summary>
    /// <param name="f">The stream.</param>
    /// <param name="desc">Receives <c>vmsd_name</c>, <c>version</c>, <c>fields</c> and <c>subsections</c> in the open object; null for none.</param>
    internal void Save(QemuFileWriter f, VmDescJson? desc);

    /// <summary>Writes fields and subsections into a record of the caller's own, without a description. BQL: held.</summary>
    /// <param name="f">The stream.</param>
    void Save(QemuFileWriter f) => Save(f, null);

    /// <summary>Reads fields and subsections. BQL: held.</summary>
    /// <param name="f">The stream.</param>
    /// <param name="versionId">Version from the section's header.</param>
    void Load(QemuFileReader f, int versionId);
}
