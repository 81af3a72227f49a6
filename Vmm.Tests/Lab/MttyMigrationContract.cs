using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Tests.Contract;

namespace Vmm.Tests.Lab;

/// <summary>The migration contract on two real mtty devices, through group and container and through cdev and iommufd.</summary>
[TestFixture(false, TestName = "Mtty(group)")]
[TestFixture(true, TestName = "Mtty(iommufd)")]
[Category(LabFixture.Category), NonParallelizable]
public sealed class MttyMigrationContract(bool iommufd) : VfioMigrationContract
{
    private LabVfio _lab = null!;
    private KernelVfioDeviceIo _source = null!, _destination = null!;

    protected override VfioMigrationFlags Flags => VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P | VfioMigrationFlags.PreCopy;

    private protected override IVfioDeviceIo Source => _source;

    private protected override IVfioDeviceIo Destination => _destination;

    [OneTimeSetUp]
    public void Open()
    {
        LabFixture.Need();
        _lab = new LabVfio();
        (_source, _destination) = (_lab.Open(LabVfio.Mtty1, iommufd), _lab.Open(LabVfio.Mtty2, iommufd));
    }

    [SetUp]
    public void Reset() => Assert.That((_source.Reset(), _destination.Reset()), Is.EqualTo((Errno.None, Errno.None)));

    [OneTimeTearDown]
    public void Close() => _lab?.Dispose();

    private protected override byte[] Change(IVfioDeviceIo device) => Uart.Change(device);

    private protected override byte[] Observe(IVfioDeviceIo device) => Uart.Observe(device);
}
