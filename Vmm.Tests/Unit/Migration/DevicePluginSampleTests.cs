using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.SaveVm;
using Vmm.Migration.Status;
using Vmm.Samples.DevicePlugin;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration;

/// <summary>A device from outside, which uses nothing but what is public, does what VFIO's does: it moves a large state while the guest runs.</summary>
[TestFixture]
public sealed class DevicePluginSampleTests
{
    private const ulong Registers = 0xe0000000, Window = 0xe0001000, Copied = 0x3000;
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(60);

    [Test]
    public async Task ADeviceFromOutsideMovesWithItsMemory([Values] bool returnPath)
    {
        using TestVm source = Vm(incoming: false), destination = Vm(incoming: true);
        Program(source.Vm.Pci);
        Store(source.Vm.Pci, page: 7, 0x1122334455667788);
        source.Vm.Cont();
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, returnPath)]);
        source.Engine.StatusChanged += status =>
        {
            // The guest goes on while its state moves: it stores, and lets the device write into its RAM.
            if (status != MigrationStatus.Active) return;
            Store(source.Vm.Pci, page: 9, 0x99aabbccddeeff00);
            source.Vm.Pci.MmioWrite(new GuestAddress(Registers + 0x08), 8, Copied);
            source.Vm.Pci.MmioWrite(new GuestAddress(Registers + 0x10), 4, 1);
            LeakCheck.WaitFor(() => Copy(source) == 0x99aabbccddeeff00, "the device copies");
        };
        (InMemoryChannel here, InMemoryChannel there) = InMemoryChannel.CreatePair();
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(there);
        Assert.That(await source.Engine.Migrate(here).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{destination.Engine.Query().Error}");
        Assert.That(destination.Vm.Pci.MmioRead(new GuestAddress(Registers), 4), Is.EqualTo(9));
        Assert.That(destination.Vm.Pci.MmioRead(new GuestAddress(Window), 8), Is.EqualTo(0x99aabbccddeeff00));
        destination.Vm.Pci.MmioWrite(new GuestAddress(Registers), 4, 7);
        Assert.That(destination.Vm.Pci.MmioRead(new GuestAddress(Window), 8), Is.EqualTo(0x1122334455667788));
        Assert.That(Copy(destination), Is.EqualTo(0x99aabbccddeeff00));
    }

    [Test]
    public void ADeviceFromOutsideCanForbidToMove()
    {
        using TestVm source = Vm(incoming: false);
        StoreDevice device = source.Vm.Devices.OfType<StoreDevice>().Single();
        device.Pin();
        (InMemoryChannel here, InMemoryChannel there) = InMemoryChannel.CreatePair();
        using (there)
        {
            MigrationBlockedException refused = Assert.Throws<MigrationBlockedException>(() => source.Engine.Migrate(here))!;
            Assert.That(refused.Message, Does.Contain("device 'store' is pinned"));
        }
        device.Unpin();
        Assert.That(source.Engine.Query().BlockedReasons, Is.Empty);
    }

    private static TestVm Vm(bool incoming) => new(new VmOptions
    {
        Memory = [new RamBlockOptions { Name = "ram", SizeBytes = 4 << 20 }], Devices = [new DeviceOptions("store")], IsIncoming = incoming,
    }, static b => b.AddStoreDevice());

    private static void Program(PciHost pci)
    {
        ushort bdf = pci.Functions.Single().Address.DevFn;
        pci.ConfigWrite(bdf, PciRegisters.BaseAddress0, 4, (uint)Registers);
        pci.ConfigWrite(bdf, PciRegisters.BaseAddress0 + 4, 4, (uint)Window);
        pci.ConfigWrite(bdf, PciRegisters.Command, 2, (uint)(PciCommand.Memory | PciCommand.Master));
    }

    private static void Store(PciHost pci, uint page, ulong value)
    {
        pci.MmioWrite(new GuestAddress(Registers), 4, page);
        pci.MmioWrite(new GuestAddress(Window), 8, value);
    }

    private static ulong Copy(TestVm vm) => BitConverter.ToUInt64(vm.Ram.ReadOnlySlice(Copied, 8));
}
