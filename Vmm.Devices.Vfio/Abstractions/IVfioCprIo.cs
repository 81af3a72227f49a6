using Vmm.Core.Cpr;
using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.Abstractions;

/// <summary>A device's io that can change process with its session (vfio-migration 7). BQL: held for every call.</summary>
internal interface IVfioCprIo
{
    /// <summary>Why the device cannot change process, or null.</summary>
    string? CprBlockedReason { get; }

    /// <summary>Whether a register can be sized by writing to it now; false for a device that must not be changed.</summary>
    bool AnswersProbes { get; }

    /// <summary>Called when the new process has the state: acquires what must be in place before the old process may let go.</summary>
    /// <exception cref="VmmException">It cannot be acquired; the old process goes on.</exception>
    void LoadCpr();

    /// <summary>Called when the device is open: adds the descriptors that the next process needs.</summary>
    void EnterCpr(CprFdTable table, string id);

    /// <summary>Sends the device no more requests and leaves its messages unread. The VM is stopped.</summary>
    void SuspendCpr();

    /// <summary>Uses the device again: in the old process after a failure, or in the new one. Resets and maps nothing.</summary>
    void ResumeCpr();

    /// <summary>Called when the new process has the device; this one must only close its descriptors.</summary>
    void HandOverCpr();
}
