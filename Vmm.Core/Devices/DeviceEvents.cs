namespace Vmm.Core.Devices;

/// <summary>An event of a device, which management sees as a QMP event.</summary>
/// <param name="Name">Event name, e.g. <c>RTC_CHANGE</c>.</param>
/// <param name="Data">Members in order; all values are strings.</param>
public sealed record DeviceEvent(string Name, IReadOnlyList<KeyValuePair<string, string>> Data);

/// <summary>Events of one VM's devices. Thread-safe; handlers run on the thread that raises the event and must not block.</summary>
public sealed class DeviceEvents
{
    /// <summary>Raised for every event.</summary>
    public event Action<DeviceEvent>? Raised;

    /// <summary>Raises an event.</summary>
    public void Raise(string name, params KeyValuePair<string, string>[] data) => Raised?.Invoke(new DeviceEvent(name, data));
}
