using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>What a device does with the sections of a snapshot (see <see cref="VfioUserStateReader"/>). Session's thread.</summary>
public interface IVfioUserStateSink
{
    /// <summary>A snapshot begins; forget what another one gave.</summary>
    void BeginSnapshot();

    /// <summary>A section begins.</summary>
    /// <param name="id">Its number.</param>
    /// <param name="lengthBytes">Its length.</param>
    /// <returns>EINVAL for one the device does not know, or of a wrong length.</returns>
    Errno BeginSection(uint id, ulong lengthBytes);

    /// <summary>A part of the present section; parts come in order and stay inside its length.</summary>
    /// <param name="id">Its number.</param>
    /// <param name="offset">From its start.</param>
    /// <param name="data">The part.</param>
    /// <returns>Why it is refused.</returns>
    Errno SectionData(uint id, ulong offset, ReadOnlySpan<byte> data);

    /// <summary>The snapshot is complete and its checksum right: check the whole and make it the device's state.</summary>
    /// <returns>Why it is refused.</returns>
    ValueTask<Errno> Commit();
}
