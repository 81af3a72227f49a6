namespace Vmm.Core.Devices;

/// <summary>Something a device tells the management, as a QMP event.</summary>
/// <param name="Name">Event name, e.g. <c>RTC_CHANGE</c>.</param>
/// <param name="Data">Members, all strings, in order.</param>
public sealed record DeviceEvent(string Name, IReadOnlyList<KeyValuePair<string, string>> Data);

/// <summary>Events of one VM's devices. Thread-safe; handlers run on the raising thread and must not block.</summary>
public sealed class DeviceEvents
{
    /// <summary>Raised for every event.</summary>
    public event Action<DeviceEvent>? Raised;

    /// <summary>Raises an event.</summary>
    /// <param name="name">Name.</param>
    /// <param name="data">Members.</param>
    public void Raise(string name, params KeyValuePair<string, string>[] data) => Raised?.Invoke(new DeviceEvent(name, data));
}
