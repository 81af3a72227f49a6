using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Tests.Lab;

/// <summary>Requests migration states directly, for tests that need the data descriptor itself.</summary>
internal static class LabSession
{
    private static readonly KernelVfio s_kernel = new();

    /// <summary>Requests a state that opens a data session.</summary>
    internal static OwnedFd Open(KernelVfioDeviceIo device, VfioDeviceState state)
    {
        byte[] request =
        [
            .. BitConverter.GetBytes(16), .. BitConverter.GetBytes((uint)VfioDeviceFeature.MigDeviceState | (uint)VfioFeatureOp.Set),
            .. BitConverter.GetBytes((uint)state), .. BitConverter.GetBytes(-1),
        ];
        s_kernel.Ioctl(device.Fd, VfioUapi.VFIO_DEVICE_FEATURE, request, out Errno errno);
        Assert.That(errno, Is.EqualTo(Errno.None), $"to {state}");
        return new OwnedFd(BitConverter.ToInt32(request, 12));
    }

    /// <summary>Requests a state that opens no data session.</summary>
    internal static void Set(KernelVfioDeviceIo device, VfioDeviceState state)
    {
        Assert.That(device.SetMigrationState(state, out IVfioMigrationData? data), Is.EqualTo(Errno.None), $"to {state}");
        data?.Dispose();
    }

    /// <summary>The state that the device is in.</summary>
    internal static VfioDeviceState State(KernelVfioDeviceIo device)
    {
        Assert.That(device.GetMigrationState(out VfioDeviceState state), Is.EqualTo(Errno.None));
        return state;
    }
}
