using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>
/// One attempt to save. The object holds all state of the attempt (vfio-user S-49). Session's thread. Exceptions: as for <see cref="IVfioUserBackend"/>.
/// </summary>
public interface IVfioUserSave : IDisposable
{
    /// <summary>
    /// Called when the device has stopped (arc PRE_COPY to STOP_COPY); the data from here on must be complete by themselves (vfio-user S-37). Not
    /// called for a session opened in STOP_COPY.
    /// </summary>
    void StopCopy();

    /// <summary>Reads the next part of the state, in order, each byte once. No total size is needed (vfio-user S-44).</summary>
    /// <param name="destination">Buffer to fill from its start; not empty.</param>
    /// <param name="errno">Reason when the result is -1, else None.</param>
    /// <returns>Bytes read; 0 at the end, or in PRE_COPY when there is nothing now; -1 with an errno.</returns>
    int ReadState(Span<byte> destination, out Errno errno);

    /// <summary>Gives the next bytes in place, so that they are sent without a copy. When it cannot, <see cref="ReadState"/> is called.</summary>
    /// <param name="count">Number of bytes wanted; no fewer will do.</param>
    /// <param name="bytes">The bytes, which must not change until the next call.</param>
    /// <returns>False when they are not contiguous in memory, or fewer are left; nothing was consumed.</returns>
    bool TryTake(int count, out ReadOnlyMemory<byte> bytes);
}
