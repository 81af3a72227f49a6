using System.Buffers.Binary;
using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Hosted;
using Vmm.Tests.Support;
using Vmm.Tools.Devices;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>
/// The edu model runs in a VM of this process and served to another VM. In both, its DMA reaches memory, marks pages dirty and continues after a move.
/// </summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
internal sealed class EduDeviceTests
{
    private const ulong Bar = 0xe0000000, Pages = 256, Source = 0x10000;

    [Test]
    public void InAVmTheGuestFindsItItCopiesMemoryAndInterrupts()
    {
        using ServiceProvider services = Services();
        using var vm = Make(services);
        using var interrupts = new Attached(vm);
        Program(vm);
        for (ulong page = 1; page < 5; page++) Copy(new InVm(vm), page);
        byte[] found = new byte[4096];
        vm.Memory.Read(new GuestAddress(Source + (3 * 4096)), found);
        Assert.That(found, Is.EqualTo(Block(3)));
        Assert.That(interrupts.Level, Is.True);
        vm.Pci.MmioWrite(new GuestAddress(Bar + 0x64), 4, 0x100);
        Assert.That(interrupts.Level, Is.False);
    }

    [Test]
    public void InAVmADmaThatIsUnderWayIsDoneAfterTheMove()
    {
        using ServiceProvider services = Services();
        using Vm source = Make(services), target = Make(services, isIncoming: true);
        Program(source);
        source.Memory.Write(new GuestAddress(Source), Block(9));
        source.Stop();
        Start(new InVm(source), Source, EduDevice.BufferAt, 1);
        Assert.That(source.Pci.MmioRead(new GuestAddress(Bar + 0x98), 8), Is.EqualTo(1UL), "a stopped VM's device does no DMA");
        target.Memory.Write(new GuestAddress(Source), Block(9));
        Move(source, target);
        using (target.Bql.Acquire()) target.RunState.Set(Vmm.Core.RunStates.RunState.Paused);
        target.Cont();
        LeakCheck.WaitFor(() => target.Pci.MmioRead(new GuestAddress(Bar + 0x98), 8) == 0, "the DMA is not done");
        Start(new InVm(target), EduDevice.BufferAt, Source + 4096, 3);
        LeakCheck.WaitFor(() => target.Pci.MmioRead(new GuestAddress(Bar + 0x98), 8) == 2, "the DMA is not done");
        byte[] found = new byte[4096];
        target.Memory.Read(new GuestAddress(Source + 4096), found);
        Assert.That(found, Is.EqualTo(Block(9)));
    }

    /// <summary>DMA goes by descriptors or by messages. The move is cancelled three times, and the dirty log has every page that the device wrote.</summary>
    [Test]
    public void ServedItMovesWhileItsGuestKeepsItBusyWithDma([Values] bool sharedRam)
    {
        using var source = new VfioUserSide(Serve(), sharedRam, Source + (Pages * 4096));
        using var target = new VfioUserSide(Serve(), sharedRam, Source + (Pages * 4096));
        source.Write(VfioPciRegion.Config, 4, [6, 0]);
        target.Io.SetBusMaster(true);
        source.Io.SetBusMaster(true);
        var guest = new OverIo(source);
        ulong next = 1;
        for (int cancel = 0; cancel < 3; cancel++)
        {
            Assert.That(source.Io.SetMigrationState(VfioDeviceState.PreCopy, out _), Is.EqualTo(Errno.None));
            Copy(guest, next++);
            if (cancel == 1) Assert.That(source.Io.SetMigrationState(VfioDeviceState.StopCopy, out _), Is.EqualTo(Errno.None));
            Assert.That(source.Io.SetMigrationState(VfioDeviceState.Running, out _), Is.EqualTo(Errno.None));
        }
        source.StartLog();
        target.CopyRam(source, null);
        Assert.That(source.Io.SetMigrationState(VfioDeviceState.PreCopy, out IVfioMigrationData? data), Is.EqualTo(Errno.None));
        for (int i = 0; i < 30; i++)
        {
            Copy(guest, next++);
            source.Report();
        }
        // Stop the device while this transfer is under way.
        FillBuffer(guest, source, next);
        Start(guest, EduDevice.BufferAt, Source + (next * 4096), 3);
        byte[] state = source.SaveStopped(data);
        // Without descriptors the client writes the pages and marks them itself, so copy all RAM.
        target.CopyRam(source, sharedRam ? source.Dirty : null);
        target.Load(state);
        Assert.That(target.Io.SetMigrationState(VfioDeviceState.Running, out _), Is.EqualTo(Errno.None));
        var moved = new OverIo(target);
        LeakCheck.WaitFor(() => (moved.Read(0x98) & 1) == 0, "the DMA is not done");
        for (ulong page = 1; page <= next; page++) Assert.That(target.ReadPage(Source + (page * 4096)), Is.EqualTo(Block(page)), $"page {page} of {next}");
        Copy(moved, next + 1);
    }

    private static ServedDevice Serve() => new(new PciDeviceType<EduPlugin>(new EduDeviceFactory()).Create(DeviceOptions.Parse("edu")));

    private static byte[] Block(ulong number)
    {
        byte[] block = new byte[4096];
        DmaTestPattern.Fill(number, block);
        return block;
    }

    /// <summary>Copies a page to the device's buffer and from there to another page, as a driver does.</summary>
    private static void Copy(IRegisters device, ulong page)
    {
        device.WriteMemory(Source, Block(page));
        Start(device, Source, EduDevice.BufferAt, 1);
        LeakCheck.WaitFor(() => (device.Read(0x98) & 1) == 0, "the DMA to the device is not done");
        Start(device, EduDevice.BufferAt, Source + (page * 4096), 7);
        LeakCheck.WaitFor(() => (device.Read(0x98) & 1) == 0, "the DMA to memory is not done");
        Assert.That(device.Read(0x24) & EduDevice.DmaInterrupt, Is.Not.Zero);
    }

    private static void FillBuffer(IRegisters device, VfioUserSide side, ulong number)
    {
        device.WriteMemory(Source, Block(number));
        Start(device, Source, EduDevice.BufferAt, 1);
        LeakCheck.WaitFor(() => (device.Read(0x98) & 1) == 0, "the DMA to the device is not done");
        Assert.That(side.Io.LostReason, Is.Null);
    }

    private static void Start(IRegisters device, ulong source, ulong destination, ulong command)
    {
        device.Write(0x80, source);
        device.Write(0x88, destination);
        device.Write(0x90, 4096);
        device.Write(0x98, command);
    }

    private static ServiceProvider Services()
    {
        var services = new ServiceCollection();
        services.AddVmm().AddPlugin<EduPlugin>();
        return services.BuildServiceProvider();
    }

    private static Vm Make(ServiceProvider services, bool isIncoming = false)
    {
        Vm vm = services.GetRequiredService<VmFactory>().Create(new VmOptions
        {
            Memory = [new RamBlockOptions { Name = "ram", SizeBytes = Source + (Pages * 4096) }], Devices = [DeviceOptions.Parse("edu")], IsIncoming = isIncoming,
        });
        if (!isIncoming) vm.Cont();
        return vm;
    }

    /// <summary>Moves the sections of one VM into another, framed as the server frames them.</summary>
    private static void Move(Vm source, Vm target)
    {
        (InMemoryChannel ours, InMemoryChannel theirs) = InMemoryChannel.CreatePair();
        using (var writer = new QemuFileWriter(ours)) HostedStream.Save(source, writer);
        ours.Shutdown(ChannelShutdown.Write);
        HostedStream.Load(target, new QemuFileReader(theirs));
    }

    private static void Program(Vm vm)
    {
        vm.Pci.ConfigWrite(8, 0x10, 4, (uint)Bar);
        vm.Pci.ConfigWrite(8, 4, 2, 6);
        Assert.That(vm.Pci.MmioRead(new GuestAddress(Bar), 4), Is.EqualTo(EduDevice.Identification));
    }

    private interface IRegisters
    {
        ulong Read(ulong register);
        void Write(ulong register, ulong value);
        void WriteMemory(ulong address, byte[] bytes);
    }

    private sealed class InVm(Vm vm) : IRegisters
    {
        public ulong Read(ulong register) => vm.Pci.MmioRead(new GuestAddress(Bar + register), register < 0x80 ? 4 : 8);

        public void Write(ulong register, ulong value) => vm.Pci.MmioWrite(new GuestAddress(Bar + register), 8, value);

        public void WriteMemory(ulong address, byte[] bytes) => vm.Memory.Write(new GuestAddress(address), bytes);
    }

    private sealed class OverIo(VfioUserSide side) : IRegisters
    {
        public ulong Read(ulong register)
        {
            byte[] bytes = new byte[8];
            Assert.That(side.Io.RegionRead(0, register, bytes.AsSpan(0, register < 0x80 ? 4 : 8)), Is.EqualTo(Errno.None));
            return BinaryPrimitives.ReadUInt64LittleEndian(bytes);
        }

        public void Write(ulong register, ulong value) => Assert.That(side.Io.RegionWrite(0, register, BitConverter.GetBytes(value)), Is.EqualTo(Errno.None));

        public void WriteMemory(ulong address, byte[] bytes) => side.Memory.Write(new GuestAddress(address), bytes);
    }

    private sealed class Attached : IInterruptController, IDisposable
    {
        private readonly IDisposable _registration;

        internal Attached(Vm vm)
        {
            using (vm.Bql.Acquire()) _registration = vm.Services.GetRequiredService<InterruptRouter>().Attach(this);
        }

        internal bool Level { get; private set; }

        public void SetIntx(int line, bool level)
        {
            if (line == PciHost.Swizzle(1, 0)) Level = level;
        }

        public void SendMsi(MsiMessage message, ushort requesterId)
        {
        }

        public void Dispose() => _registration.Dispose();
    }
}
