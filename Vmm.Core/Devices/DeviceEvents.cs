namespace Vmm.Core.Devices;

/// <summary>Events of one VM's devices. Thread-safe; handlers run on the raising thread and must not block.</summary>
public sealed class DeviceEvents
{
    /// <summary>Raised for every event with its name, e.g. <c>RTC_CHANGE</c>, and its members in order.</summary>
    public event Action<string, IReadOnlyList<KeyValuePair<string, string>>>? Raised;

    /// <summary>Raises an event.</summary>
    public void Raise(string name, params KeyValuePair<string, string>[] data) => Raised?.Invoke(name, data);
}
