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

    /// <summary>True when the section is sent at all (QEMU: <c>needed</c>). BQL: held.</summary>
    bool IsNeeded();

    /// <summary>
    /// Writes fields and subsections to the stream, and <c>vmsd_name</c>, <c>version</c>, <c>fields</c> and <c>subsections</c> into the open object of
    /// <paramref name="desc"/> unless that is null. BQL: held.
    /// </summary>
    internal void Save(QemuFileWriter f, VmDescJson? desc);

    /// <summary>Writes fields and subsections into a record of the caller's own, without a description. BQL: held.</summary>
    /// <exception cref="Errors.DeviceStateException">A hook or a check of the description failed.</exception>
    /// <exception cref="Errors.ChannelException">The channel failed.</exception>
    void Save(QemuFileWriter f) => Save(f, null);

    /// <summary>Reads fields and subsections; <paramref name="versionId"/> comes from the section's header. BQL: held.</summary>
    /// <exception cref="Errors.StreamFormatException">A value that the description does not allow; earlier fields have been loaded already.</exception>
    /// <exception cref="Errors.StreamTruncatedException">The stream ended in a field.</exception>
    /// <exception cref="Errors.StreamLimitException">A count or a depth is over its limit.</exception>
    /// <exception cref="Errors.IncompatibleStateException">A version or a subsection that this description does not have.</exception>
    /// <exception cref="Errors.DeviceStateException">A hook failed.</exception>
    void Load(QemuFileReader f, int versionId);
}
