using Vmm.Core.Cpr;
using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>A device's io that can change process with its session (vfio-migration 7). BQL: held for every call.</summary>
internal interface IVfioCprIo
{
    /// <summary>Why the device cannot change process, or null.</summary>
    string? CprBlockedReason { get; }

    /// <summary>Whether a register that is written to learn its size answers, now: not in a device that must not be touched.</summary>
    bool AnswersProbes { get; }

    /// <summary>The new process has the state: takes up what must be in place before the old process may let go.</summary>
    /// <exception cref="VmmException">It cannot be had; the old process goes on.</exception>
    void LoadCpr();

    /// <summary>The device is open: enters what the next process needs.</summary>
    /// <param name="table">The VM's descriptors.</param>
    /// <param name="id">The device's id.</param>
    void EnterCpr(CprFdTable table, string id);

    /// <summary>Leaves the device alone from here on; what it sends waits. The VM is stopped.</summary>
    void SuspendCpr();

    /// <summary>Takes the device up: after a failure in the old process, or on arrival in the new one. Nothing is reset or mapped anew.</summary>
    void ResumeCpr();

    /// <summary>The new process has the device: this one must only close its descriptors.</summary>
    void HandOverCpr();
}
