using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Tests.Fakes;

namespace Vmm.Tests.Contract;

/// <summary>The contract on the kernel backend over <see cref="FakeVfioKernel"/>.</summary>
[TestFixture]
public sealed class FakeKernelDeviceIoContract : VfioDeviceIoContract
{
    private FakeVfioHost _host = null!;
    private KernelVfioDeviceIo _device = null!;

    private protected override IVfioDeviceIo Device => _device;

    protected override bool Resets => true;

    [SetUp]
    public void Open()
    {
        _host = new FakeVfioHost();
        _host.AddPci("0000:00:01.0");
        _device = _host.Open("host=0000:00:01.0");
    }

    [TearDown]
    public void Close()
    {
        _device.Dispose();
        _host.Dispose();
    }
}
