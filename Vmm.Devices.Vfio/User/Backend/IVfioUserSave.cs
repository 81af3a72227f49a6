using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>One attempt to save; everything that belongs to the attempt is in here (vfio-user S-49). Session's thread.</summary>
public interface IVfioUserSave : IDisposable
{
    /// <summary>The device has stopped (arc PRE_COPY to STOP_COPY); what follows must be complete by itself (vfio-user S-37). Not called for a session opened in STOP_COPY.</summary>
    void StopCopy();

    /// <summary>Reads the next part of the state, in order, each byte once. The total is never asked for (vfio-user S-44).</summary>
    /// <param name="destination">Not empty.</param>
    /// <param name="errno">Why it failed.</param>
    /// <returns>Bytes; 0 at the end, or when there is nothing now in PRE_COPY; -1 with an errno.</returns>
    int ReadState(Span<byte> destination, out Errno errno);

    /// <summary>Gives the next bytes where they are, to be sent without a copy; else <see cref="ReadState"/> is called.</summary>
    /// <param name="count">Exactly so many.</param>
    /// <param name="bytes">The bytes; unchanged until the next call.</param>
    /// <returns>False when they do not lie together, or there are fewer; nothing was consumed.</returns>
    bool TryTake(int count, out ReadOnlyMemory<byte> bytes);
}
