using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>One attempt to load. Session's thread.</summary>
public interface IVfioUserLoad : IDisposable
{
    /// <summary>Takes the next part of the state, in pieces of any size (vfio-user S-40); parse and check it here (vfio-user S-53).</summary>
    /// <param name="source">Bytes.</param>
    /// <returns>EINVAL for what is malformed, EFBIG over the declared limit.</returns>
    Errno WriteState(ReadOnlySpan<byte> source);

    /// <summary>All data has come (arc RESUMING to STOP): checks that the state is complete and makes it the device's.</summary>
    /// <returns>Not None: the state stays RESUMING and only a reset leaves it.</returns>
    ValueTask<Errno> Commit();
}
