using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>One attempt to load one device, below the tags that <see cref="VfioLoad"/> reads. Failures are <see cref="VfioException"/>s.</summary>
internal interface IVfioLoadSession
{
    /// <summary>Passes data to the device in bounded pieces. BQL: not held.</summary>
    /// <param name="f">The stream, at the first byte of the data.</param>
    /// <param name="lengthBytes">Bytes that follow.</param>
    void LoadData(QemuFileReader f, ulong lengthBytes);

    /// <summary>All data have come: the device checks them where the protocol lets it. BQL: held.</summary>
    void LoadDone();

    /// <summary>Closes the session, whether the attempt succeeded or not; must not throw. BQL: held.</summary>
    void LoadCleanup();
}

/// <summary>A loading session that takes the final state on a thread of its own. BQL: not held.</summary>
internal interface IVfioThreadedLoad : IVfioLoadSession
{
    /// <summary>Passes bytes to the device, in the order in which it gave them.</summary>
    void LoadBytes(ReadOnlySpan<byte> bytes);
}
