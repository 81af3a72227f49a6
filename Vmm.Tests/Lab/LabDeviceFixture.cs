using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Tests.Lab;

/// <summary>Tests that make devices of our module; they are removed after each test.</summary>
public abstract class LabDeviceFixture : LabFixture
{
    private protected const int Stop = (int)VfioDeviceState.Stop, Running = (int)VfioDeviceState.Running, StopCopy = (int)VfioDeviceState.StopCopy, Resuming = (int)VfioDeviceState.Resuming,
        RunningP2P = (int)VfioDeviceState.RunningP2P, PreCopy = (int)VfioDeviceState.PreCopy, PreCopyP2P = (int)VfioDeviceState.PreCopyP2P;

    private readonly List<LabDevice> _made = [];

    /// <summary>Devices of this test, in the order they were made.</summary>
    private protected IReadOnlyList<LabDevice> Made => _made;

    [TearDown]
    public void RemoveDevices()
    {
        foreach (LabDevice device in _made) device.Dispose();
        _made.Clear();
    }

    private protected LabDevice Make(string type)
    {
        var device = new LabDevice(type);
        _made.Add(device);
        return device;
    }
}
