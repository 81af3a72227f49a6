namespace Vmm.Tests.Lab;

/// <summary>A device of the lab's kernel module (tools/lab/module). A test creates it, and dispose removes it.</summary>
internal sealed class LabDevice : IDisposable
{
    private readonly string _uuid = Guid.NewGuid().ToString();

    internal LabDevice(string type)
    {
        File.WriteAllText($"/sys/class/vmm_lab/vmm_lab/mdev_supported_types/vmm_lab-{type}/create", _uuid);
    }

    internal string Path => $"/sys/bus/mdev/devices/{_uuid}";

    /// <summary>Sets a knob; the module's README lists their names.</summary>
    internal object this[string knob]
    {
        set => File.WriteAllText($"{Path}/lab/{knob}", value.ToString());
    }

    /// <summary>The states entered since the log was emptied. Places are numbers in one order over all devices.</summary>
    internal IReadOnlyList<(int Place, int State)> Log =>
        [.. File.ReadAllLines($"{Path}/lab/log").Select(static l => l.Split(' ')).Select(static p => (int.Parse(p[0]), int.Parse(p[1])))];

    /// <summary>The states of <see cref="Log"/> without their places.</summary>
    internal IEnumerable<int> States => Log.Select(static l => l.State);

    public void Dispose() => File.WriteAllText($"{Path}/remove", "1");
}
