using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Errors;

namespace Vmm.Core.Devices;

/// <summary>Makes VMs, each in its own DI scope. Thread-safe.</summary>
public sealed class VmFactory(IServiceScopeFactory scopes)
{
    /// <summary>Makes a VM in state prelaunch or inmigrate. The VM owns its scope; dispose the VM after everything that uses it.</summary>
    /// <exception cref="VmmException">An option is refused or the kernel cannot provide the memory; nothing is left behind.</exception>
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
