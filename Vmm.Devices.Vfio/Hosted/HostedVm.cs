using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Devices.Vfio.Hosted;

/// <summary>
/// A VM without RAM or CPUs around one PCI function that is served to another VMM. The function does DMA to the client's memory and signals the
/// client's eventfds. Each such VM runs and stops by itself (vfio-user S-58) and shares nothing with another one (vfio-user S-51).
/// </summary>
internal sealed class HostedVm : IDisposable
{
    private readonly ServiceProvider _services;
    private IDisposable? _interrupts;

    /// <summary>Makes a stopped VM with one device; with <paramref name="isIncoming"/>, one that waits for a state.</summary>
    /// <exception cref="ConfigurationException">The device refuses its options, is not a PCI function, or is not alone.</exception>
    internal HostedVm(Action<VmmBuilder> configure, DeviceOptions options, bool isIncoming)
    {
        var services = new ServiceCollection();
        configure(services.AddVmm());
        _services = services.BuildServiceProvider();
        try
        {
            Vm = _services.GetRequiredService<VmFactory>().Create(new VmOptions { Devices = [options], IsIncoming = isIncoming });
            PciDevice[] functions = [.. Vm.Pci.Functions];
            if (functions.Length != 1) throw new ConfigurationException($"device '{options.TypeName}' has {functions.Length} PCI functions; one can be served");
            Function = functions[0];
        }
        catch
        {
            // Disposing the services disposes the VM too.
            _services.Dispose();
            throw;
        }
    }

    internal Vm Vm { get; }

    internal PciDevice Function { get; }

    /// <summary>Connects the function to the client, which sees the present interrupt levels at once.</summary>
    internal void Connect(VfioUserHost host, VfioUserDmaGate gate)
    {
        using (Vm.Bql.Acquire())
        {
            Vm.Pci.Dma = new ClientMemory(host.Dma, gate);
            Function.RedirectVectors(v => host.Irqs.Raise(VfioPciIrq.Msi, (uint)v), v => host.Irqs.Raise(VfioPciIrq.Msix, (uint)v));
            _interrupts = Vm.Services.GetRequiredService<InterruptRouter>().Attach(new Lines(host.Irqs));
        }
    }

    /// <summary>Disconnects the function from the client: the device's own threads reach no memory any more.</summary>
    internal void Disconnect()
    {
        using (Vm.Bql.Acquire())
        {
            Vm.Pci.Dma = null;
            _interrupts?.Dispose();
        }
    }

    /// <summary>Moves the VM from inmigrate to paused, after its state was loaded.</summary>
    internal void EndIncoming()
    {
        using (Vm.Bql.Acquire()) Vm.RunState.Set(RunState.Paused);
    }

    public void Dispose()
    {
        Vm.Dispose();
        _services.Dispose();
    }

    /// <summary>The client's memory, behind the gate that <see cref="IVfioUserBackend.Quiesce"/> closes.</summary>
    private sealed class ClientMemory(DmaMap dma, VfioUserDmaGate gate) : IPciDma
    {
        public Errno Read(ulong address, Span<byte> destination)
        {
            if (!gate.Enter()) return Errno.ENOTCONN;
            try
            {
                return dma.Read(address, destination);
            }
            finally
            {
                gate.Exit();
            }
        }

        public Errno Write(ulong address, ReadOnlySpan<byte> source)
        {
            if (!gate.Enter()) return Errno.ENOTCONN;
            try
            {
                return dma.Write(address, source);
            }
            finally
            {
                gate.Exit();
            }
        }
    }

    /// <summary>The function drives the one line of the bus that belongs to its slot; the client sees it as INTx.</summary>
    private sealed class Lines(VfioUserIrqs irqs) : IInterruptController
    {
        private int _asserted;

        public void SetIntx(int line, bool level)
        {
            _asserted = level ? _asserted | (1 << line) : _asserted & ~(1 << line);
            irqs.SetIntx(_asserted != 0);
        }

        public void SendMsi(MsiMessage message, ushort requesterId) =>
            throw new InvalidOperationException("a served function's vectors go by number");
    }
}
