using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>One attempt to load. Session's thread. Exceptions: as for <see cref="IVfioUserBackend"/>.</summary>
public interface IVfioUserLoad : IDisposable
{
    /// <summary>Takes the next part of the state, in pieces of any size (vfio-user S-40), and parses and checks it at once (vfio-user S-53).</summary>
    /// <param name="source">The next bytes, in order.</param>
    /// <returns>None, EINVAL when the state is malformed, or EFBIG when it is over the device's limit.</returns>
    Errno WriteState(ReadOnlySpan<byte> source);

    /// <summary>All data has come (arc RESUMING to STOP): checks that the state is complete and makes it the device's.</summary>
    /// <returns>None, or an errno to refuse; the device then stays in RESUMING until a reset.</returns>
    ValueTask<Errno> Commit();
}
