using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Ram;

/// <summary>
/// The <c>ram</c> section of one VM (stream 3; QEMU: <c>savevm_ram_handlers</c>): makes a <see cref="RamSave"/> or a <see cref="RamLoad"/> for each
/// attempt.
/// </summary>
internal sealed class RamSection(GuestMemory memory, Bql bql) : IMachineComponent, ISavePrepare, ILoadSetup
{
    private IDisposable? _registration;

    public MachinePhase Phase => MachinePhase.BeforeDevices;

    public void Attach(IDeviceServices services)
    {
        _registration = services.SaveVm.Register(
            new SaveVmRegistration { IdStr = RamConstants.IdStr, InstanceId = 0, VersionId = RamConstants.VersionId, MinimumVersionId = RamConstants.VersionId },
            SaveVmHandlers.Of(this));
        services.SaveVm.ReserveSectionId(); // QEMU registers dirty-bitmap here. With its id used up, ours equal those of 11.1.
    }

    public SaveRoles SavePrepare(SaveContext context) => SaveRoles.Of(new RamSave(memory, bql, context));

    public LoadRoles LoadSetup(LoadContext context) => LoadRoles.Of(new RamLoad(memory, context));

    public void Dispose() => _registration?.Dispose();
}
