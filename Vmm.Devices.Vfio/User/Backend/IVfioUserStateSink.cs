using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>
/// Receives the sections of a snapshot for a device, from <see cref="VfioUserStateReader"/>. Session's thread. Exceptions: as for
/// <see cref="IVfioUserBackend"/>.
/// </summary>
public interface IVfioUserStateSink
{
    /// <summary>Called at the beginning of a snapshot; drop the sections of an earlier one.</summary>
    void BeginSnapshot();

    /// <summary>Called at the beginning of a section.</summary>
    /// <param name="id">The device's own number of the section.</param>
    /// <param name="lengthBytes">Length of the section in bytes.</param>
    /// <returns>None, or EINVAL when the device does not know the section or its length is wrong.</returns>
    Errno BeginSection(uint id, ulong lengthBytes);

    /// <summary>Called for each part of the section; parts come in order and never exceed its length.</summary>
    /// <param name="id">The device's own number of the section.</param>
    /// <param name="offset">Offset of the part in the section.</param>
    /// <param name="data">The bytes; valid during the call.</param>
    /// <returns>None, or the errno of a refusal.</returns>
    Errno SectionData(uint id, ulong offset, ReadOnlySpan<byte> data);

    /// <summary>Called when the snapshot is complete and its checksum right: check it as a whole and make it the device's state.</summary>
    /// <returns>None, or the errno of a refusal.</returns>
    ValueTask<Errno> Commit();
}
