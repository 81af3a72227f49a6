using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Tests.Contract;

namespace Vmm.Tests.Lab;

/// <summary>The migration contract with each set of flags, on devices of our own module under the kernel's state machine.</summary>
[TestFixture("v2", VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P | VfioMigrationFlags.PreCopy, TestName = "Module(all)")]
[TestFixture("v2_nop2p", VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy, TestName = "Module(nop2p)")]
[TestFixture("v2_noprecopy", VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P, TestName = "Module(noprecopy)")]
[TestFixture("v2_stopcopy", VfioMigrationFlags.StopCopy, TestName = "Module(stopcopy)")]
[Category(LabFixture.Category), NonParallelizable]
public sealed class ModuleMigrationContract(string type, VfioMigrationFlags flags) : VfioMigrationContract
{
    private LabDevice _first = null!, _second = null!;
    private LabVfio _lab = null!;
    private KernelVfioDeviceIo _source = null!, _destination = null!;

    protected override VfioMigrationFlags Flags => flags;

    private protected override IVfioDeviceIo Source => _source;

    private protected override IVfioDeviceIo Destination => _destination;

    [OneTimeSetUp]
    public void Open()
    {
        LabFixture.Need();
        _lab = new LabVfio();
        (_first, _second) = (new LabDevice(type), new LabDevice(type));
        (_source, _destination) = (_lab.Open(_first.Path, iommufd: true), _lab.Open(_second.Path, iommufd: true));
    }

    [SetUp]
    public void Reset() => Assert.That((_source.Reset(), _destination.Reset()), Is.EqualTo((Errno.None, Errno.None)));

    [OneTimeTearDown]
    public void Close()
    {
        _source?.Dispose();
        _destination?.Dispose();
        _lab?.Dispose();
        _first?.Dispose();
        _second?.Dispose();
    }

    private protected override byte[] Change(IVfioDeviceIo device) => LabMemory.Fill(device, 7);

    private protected override byte[] Observe(IVfioDeviceIo device) => LabMemory.Read(device);

    [Test]
    public void Spec2_EnomsgInPrecopyIsNoEnd()
    {
        if (RefusesPreCopy()) return;
        _first["enomsg"] = 1;
        try
        {
            IVfioMigrationData data = Set(_source, VfioDeviceState.PreCopy)!;
            byte[] buffer = new byte[4096];
            Assert.That(data.Read(buffer, out Errno errno), Is.Positive);
            Assert.That((data.Read(buffer, out errno), errno), Is.EqualTo((-1, Errno.ENOMSG)));
            Set(_source, VfioDeviceState.StopCopy);
            Assert.That(data.Read(buffer, out errno), Is.Positive);
        }
        finally
        {
            _first["enomsg"] = 0;
        }
    }

    [Test]
    public void Spec2_ARefusedArcLeavesTheDeviceOnTheWay()
    {
        bool p2p = (flags & VfioMigrationFlags.P2P) != 0;
        _first["refuse"] = $"{(int)VfioDeviceState.Stop} {(int)VfioDeviceState.StopCopy} {(int)Errno.EBUSY} 1";
        Assert.That(_source.SetMigrationState(VfioDeviceState.StopCopy, out IVfioMigrationData? data), Is.EqualTo(Errno.EBUSY));
        Assert.That((data, _source.GetMigrationState(out VfioDeviceState state), state), Is.EqualTo(((IVfioMigrationData?)null, Errno.None, VfioDeviceState.Stop)), $"P2P {p2p}");
        Set(_source, VfioDeviceState.Running);
    }

    [Test]
    public void Spec1_11_ReinitIsToldOnceAskedFor()
    {
        if ((flags & VfioMigrationFlags.PreCopy) == 0)
        {
            Assert.That(_source.DeviceFeature(VfioDeviceFeature.MigPrecopyInfoV2, VfioFeatureOp.Set, []), Is.EqualTo(Errno.EINVAL));
            return;
        }
        _first["reinit"] = 1;
        try
        {
            Assert.That(_source.DeviceFeature(VfioDeviceFeature.MigPrecopyInfoV2, VfioFeatureOp.Set, []), Is.EqualTo(Errno.None));
            IVfioMigrationData data = Set(_source, VfioDeviceState.PreCopy)!;
            data.Read(new byte[4096], out _);
            Assert.That((data.PrecopyInfo(out VfioPrecopyInfo info), info), Is.EqualTo((Errno.None, new VfioPrecopyInfo(80, 0, IsReinit: true))));
            Assert.That((data.PrecopyInfo(out info), info), Is.EqualTo((Errno.None, new VfioPrecopyInfo(80, 0, IsReinit: false))));
        }
        finally
        {
            _first["reinit"] = 0;
        }
    }
}
