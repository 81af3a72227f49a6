using Vmm.Core.Errors;

namespace Vmm.Core.Devices;

/// <summary>Events of one VM's devices. Thread-safe; handlers run on the raising thread and must not block.</summary>
public sealed class DeviceEvents
{
    /// <summary>Raised for every event with its name, e.g. <c>RTC_CHANGE</c>, and its members in order.</summary>
    public event Action<string, IReadOnlyList<KeyValuePair<string, string>>>? Raised;

    /// <summary>
    /// Raised when a device is gone, e.g. because the process behind it ended, with its id and the reason. The guest runs on without it; a migration
    /// that needs the device fails.
    /// </summary>
    public event Action<string, VmmException>? Lost;

    /// <summary>Raised when a lost device is there again, after a reset of the VM, with its id.</summary>
    public event Action<string>? Returned;

    /// <summary>Tells that a device is gone.</summary>
    /// <param name="id">The device's id.</param>
    /// <param name="reason">Why.</param>
    public void RaiseLost(string id, VmmException reason) => Lost?.Invoke(id, reason);

    /// <summary>Tells that a lost device is there again.</summary>
    /// <param name="id">The device's id.</param>
    public void RaiseReturned(string id) => Returned?.Invoke(id);

    /// <summary>Raises an event.</summary>
    public void Raise(string name, params KeyValuePair<string, string>[] data) => Raised?.Invoke(name, data);
}
