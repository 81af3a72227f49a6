using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// One attempt to save one device, below the tags that <see cref="VfioSave"/> writes. The BQL is held or not as <see cref="ISaveLive"/> says.
/// Failures are <see cref="VfioException"/>s.
/// </summary>
internal interface IVfioSaveSession
{
    /// <summary>Makes the device begin to save, as far as its state allows. BQL: held.</summary>
    void SaveSetup();

    /// <summary>The device did not say how much state it has when the session last asked, so a large size counts.</summary>
    bool IsSizeUnknown { get; }

    /// <summary>Whether PART sections can carry data now.</summary>
    bool IsActiveIterate { get; }

    /// <summary>What is left, from figures at hand. BQL: not held.</summary>
    PendingBytes EstimatePending();

    /// <summary>What is left, by the device's answer. BQL: held.</summary>
    PendingBytes ExactPending();

    /// <summary>Writes the data record of one PART section, if any.</summary>
    /// <returns>Whether anything is left, and the tag that ends the section.</returns>
    (SaveProgress Progress, ulong EndTag) SaveIterate(QemuFileWriter f);

    /// <summary>Moves the device to STOP_COPY and writes all that is left as data records. BQL: held.</summary>
    void SaveComplete(QemuFileWriter f);

    /// <summary>The number of acknowledgements that the device has begun to wait for since the last call. Any thread.</summary>
    int TakeSwitchoverAckRequests();

    /// <summary>Closes the session, whether the attempt succeeded or not; never throws. BQL: held.</summary>
    /// <returns>Why the device could not be left in good order, or null.</returns>
    VfioException? SaveCleanup();
}

/// <summary>A saving session whose final state can be read on a thread of its own. BQL: not held.</summary>
internal interface IVfioThreadedSave : IVfioSaveSession
{
    /// <summary>Moves the device to STOP_COPY, for <see cref="ReadStopCopy"/>.</summary>
    void EnterStopCopy();

    /// <summary>Reads a piece of what is left.</summary>
    /// <returns>Bytes; 0 at the end.</returns>
    int ReadStopCopy(Span<byte> into);
}
