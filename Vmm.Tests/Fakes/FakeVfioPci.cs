using Vmm.Core.Devices;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Migration;

namespace Vmm.Tests.Fakes;

/// <summary>A device of a VM that has only the migration part of a VFIO device.</summary>
internal sealed class FakeVfioPci : IVmDevice
{
    public FakeVfioPci(string id, string path, FakeVfioDevice io, IDeviceServices services, VfioMigrationOptions? options = null)
    {
        (Id, Io) = (id, io);
        Migration = VfioMigration.Realize(id, path, io, Config, options ?? new VfioMigrationOptions(), services);
    }

    public string Id { get; }

    public FakeVfioDevice Io { get; }

    public FakeConfigState Config { get; } = new();

    public VfioMigration Migration { get; }

    public VfioDeviceState State => Migration.Protocol!.State;

    public void Reset(ResetType type)
    {
        if (type != ResetType.UndoCheck) Reset();
    }

    public void Reset()
    {
        Migration.OnDeviceReset(Io.Reset() == Vmm.Core.Errors.Errno.None);
    }

    public void Dispose()
    {
        Migration.Dispose();
        Io.Dispose();
    }
}
