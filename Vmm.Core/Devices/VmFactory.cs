using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Errors;

namespace Vmm.Core.Devices;

/// <summary>Makes VMs, each in a DI scope of its own.</summary>
/// <param name="scopes">The container.</param>
public sealed class VmFactory(IServiceScopeFactory scopes)
{
    /// <summary>Makes a VM in state prelaunch or inmigrate. It owns its scope; dispose it last.</summary>
    /// <param name="options">The parts.</param>
    /// <returns>The VM.</returns>
    /// <exception cref="VmmException">An option is refused or memory cannot be had; nothing is left behind.</exception>
    public Vm Create(VmOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        IServiceScope scope = scopes.CreateScope();
        try
        {
            Vm vm = scope.ServiceProvider.GetRequiredService<Vm>();
            vm.Realize(options, scope);
            return vm;
        }
        catch
        {
            scope.Dispose();
            throw;
        }
    }
}
