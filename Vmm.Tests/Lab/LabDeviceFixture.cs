using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Tests.Lab;

/// <summary>Base of tests that create devices of our module. Each test's devices are removed after it.</summary>
public abstract class LabDeviceFixture : LabFixture
{
    private protected const int Stop = (int)VfioDeviceState.Stop, Running = (int)VfioDeviceState.Running, StopCopy = (int)VfioDeviceState.StopCopy, Resuming = (int)VfioDeviceState.Resuming,
        RunningP2P = (int)VfioDeviceState.RunningP2P, PreCopy = (int)VfioDeviceState.PreCopy, PreCopyP2P = (int)VfioDeviceState.PreCopyP2P;

    private readonly List<LabDevice> _made = [];

    /// <summary>The devices of this test, in the order of creation.</summary>
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
