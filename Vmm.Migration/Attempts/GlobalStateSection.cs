using Vmm.Core.Devices;
using Vmm.Core.SaveVm;

namespace Vmm.Migration.Attempts;

/// <summary>The <c>globalstate</c> section of one VM: makes a <see cref="GlobalState"/> for each attempt.</summary>
internal sealed class GlobalStateSection : IMachineComponent, ISavePrepare, ILoadSetup
{
    private IDisposable? _registration;

    public MachinePhase Phase => MachinePhase.AfterDevices;

    public void Attach(IDeviceServices services) => _registration = Register(services.SaveVm);

    /// <summary>Registers the section in a registry that need not be a VM's, as in a rehearsal.</summary>
    internal IDisposable Register(SaveVmRegistry registry) => registry.Register(
        new SaveVmRegistration { IdStr = GlobalState.IdStr, InstanceId = 0, VersionId = 1, MinimumVersionId = 1 }, SaveVmHandlers.Of(this));

    public SaveRoles SavePrepare(SaveContext context) => new() { VmState = new GlobalState(context.Compat) };

    public LoadRoles LoadSetup(LoadContext context) => new() { VmState = new GlobalState(context.Compat) };

    public void Dispose() => _registration?.Dispose();
}
