using System.Buffers.Binary;
using Iced.Intel;
using Vmm.Core.Devices;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Guests;
using Vmm.Tools.Devices;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>The paths between a guest and its devices, both inside the kernel and through this process.</summary>
[NonParallelizable]
internal sealed class KvmPathsTests
{
    private static readonly MsiMessage s_message = new(DevCheckGuest.Apic, DevCheckGuest.MessageVector);

    [Test]
    public void An_eventfd_raises_its_message_and_a_masked_one_keeps_it_until_it_is_unmasked()
    {
        using KvmGuest guest = Waiting();
        using OwnedFd trigger = Posix.EventFd();
        IMsiRoute route;
        using (guest.Vm.Bql.Acquire()) route = guest.Kvm.AddMsiRoute(trigger)!;
        Set(guest, route, s_message);
        Posix.SignalEventFd(trigger);
        KvmGuest.WaitFor(() => Found(guest).Messages == 1, "the message");
        Set(guest, route, null);
        Posix.SignalEventFd(trigger);
        Assert.That(IsReadable(trigger), "nobody has read the eventfd");
        Set(guest, route, s_message);
        KvmGuest.WaitFor(() => Found(guest).Messages == 2, "the message that was pending");
        using (guest.Vm.Bql.Acquire()) route.Dispose();
        Posix.SignalEventFd(trigger);
        Assert.That((Found(guest).Messages, guest.Kvm.Paths.RouteCount), Is.EqualTo((2ul, 0)));
    }

    [Test]
    public void Many_routes_have_numbers_of_their_own_and_keep_them()
    {
        using KvmGuest guest = Waiting();
        OwnedFd[] triggers = [.. Enumerable.Range(0, 40).Select(static _ => Posix.EventFd())];
        using (guest.Vm.Bql.Acquire())
        {
            IMsiRoute[] routes = [.. triggers.Select(t => guest.Kvm.AddMsiRoute(t)!)];
            foreach (IMsiRoute route in routes) route.Set(s_message);
            for (int i = 0; i < routes.Length; i += 2) routes[i].Dispose();
        }
        for (int i = 1; i < triggers.Length; i += 2)
        {
            ulong before = Found(guest).Messages;
            Posix.SignalEventFd(triggers[i]);
            KvmGuest.WaitFor(() => Found(guest).Messages == before + 1, $"message {i}");
        }
        guest.Vm.Stop();
        foreach (OwnedFd trigger in triggers) trigger.Dispose();
        Assert.That(guest.Kvm.Paths.RouteCount, Is.EqualTo(20));
    }

    [Test]
    public void An_eventfd_raises_a_pin_and_hears_of_its_acknowledgement()
    {
        using KvmGuest guest = Waiting();
        using OwnedFd trigger = Posix.EventFd(), resample = Posix.EventFd();
        IDisposable pin;
        using (guest.Vm.Bql.Acquire()) pin = guest.Kvm.AddIrqFd(2, trigger, resample)!;
        Posix.SignalEventFd(trigger);
        KvmGuest.WaitFor(() => Found(guest).Pins == 1 && IsReadable(resample), "the pin and its acknowledgement");
        using (guest.Vm.Bql.Acquire()) pin.Dispose();
    }

    [Test]
    public void A_write_signals_an_eventfd_and_mapped_registers_are_memory_without_an_exit_each()
    {
        const ulong registers = 0xd0000000, read = 0x180100;
        using var guest = new KvmGuest(KvmGuest.Code(static a =>
        {
            Label next = a.CreateLabel();
            a.mov(rdi, registers);
            a.mov(dx, 0x4000);
            a.Label(ref next);
            a.mov(al, 7);
            a.@out(dx, al);
            a.mov(rax, __qword_ptr[rdi]);
            a.mov(__qword_ptr[(long)read], rax);
            a.inc(__qword_ptr[rdi + 8]);
            a.jmp(next);
        }));
        using OwnedFd doorbell = Posix.EventFd(), file = Posix.MemFd("bar", 4096);
        using MappedRegion bar = MappedRegion.Map(file, 4096, shared: true, 0, "bar");
        bar.TryWriteIo(0, 8, 0x1122334455667788);
        IDisposable onWrite, mapped;
        using (guest.Vm.Bql.Acquire())
        {
            onWrite = guest.Kvm.AddIoEventFd(new IoEventFdRange(0x4000, 1, IsPort: true, Match: 7), doorbell)!;
            mapped = guest.Kvm.MapMmio(new GuestRange(new GuestAddress(registers), 4096), bar, 0)!;
            Assert.That(guest.Kvm.MapMmio(new GuestRange(new GuestAddress(0x1000), 4096), bar, 0), Is.Null, "the range is RAM");
            Assert.That(guest.Kvm.MapMmio(new GuestRange(new GuestAddress(registers + 0x10000), 512), bar, 0), Is.Null, "the range is not whole pages");
            Assert.That(guest.Kvm.AddIoEventFd(new IoEventFdRange(0x4000, 1, IsPort: true, Match: 7), doorbell), Is.Null, "the port has an eventfd already");
        }
        guest.Vm.Cont();
        ulong Counter() => bar.TryReadIo(8, 8, out ulong value) ? value : 0;
        KvmGuest.WaitFor(() => Counter() > 100, "100 rounds");
        byte[] seen = new byte[8];
        guest.Vm.Memory.Read(new GuestAddress(read), seen);
        Assert.That(BinaryPrimitives.ReadUInt64LittleEndian(seen), Is.EqualTo(0x1122334455667788));
        Assert.That((IsReadable(doorbell), guest.Kvm.Vcpus[0].Exits), Is.EqualTo((true, 0)));
        using (guest.Vm.Bql.Acquire()) mapped.Dispose();
        long exits = guest.Kvm.Vcpus[0].Exits;
        KvmGuest.WaitFor(() => guest.Kvm.Vcpus[0].Exits > exits + 10, "the guest's accesses trap again");
        ulong stopped = Counter();
        guest.Vm.Stop();
        Assert.That(Counter(), Is.EqualTo(stopped), "the guest no longer reaches the BAR's memory");
        using (guest.Vm.Bql.Acquire()) onWrite.Dispose();
    }

    [TestCase(false), TestCase(true)]
    public async Task A_guest_keeps_driving_its_device_over_a_live_migration(bool isServed)
    {
        byte[] image = DevCheckGuest.Build(once: false);
        using var folder = new TempDirectory();
        using ServedEdu? first = isServed ? new(folder["first"]) : null, second = isServed ? new(folder["second"]) : null;
        using var source = new KvmGuest(image, devices: [first?.Option ?? "edu"]);
        using var destination = new KvmGuest(image, incoming: true, devices: [second?.Option ?? "edu"]);
        source.Vm.Cont();
        KvmGuest.WaitFor(() => Found(source).Rounds > 2 || Found(source).Broken > 0, "two rounds");
        Task<MigrationStatus> incoming = destination.Test.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        Task<MigrationStatus> outgoing = source.Test.Engine.Migrate(MigrationAddress.Parse($"tcp:127.0.0.1:{destination.Test.Engine.Query().SocketAddresses[0].Port}"));
        Assert.That(await outgoing.WaitAsync(KvmGuest.Deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Test.Engine.Query().Error} / {destination.Test.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(KvmGuest.Deadline), Is.EqualTo(MigrationStatus.Completed));
        ulong rounds = Found(destination).Rounds;
        KvmGuest.WaitFor(() => Found(destination).Rounds > rounds + 2 || Found(destination).Broken > 0, "two more rounds");
        DevCheckGuest.Found found = Found(destination);
        Assert.That((found.Broken, found.FirstBroken), Is.EqualTo((0ul, 0ul)), $"{found}");
        Assert.That(found.Held, Is.GreaterThanOrEqualTo(13 * found.Rounds), $"{found}");
        Assert.That((found.Messages, found.Pins), Is.EqualTo((2 * found.Rounds, found.Rounds)).Using<(ulong, ulong)>(static (x, y) => x.Item1 >= y.Item1 && x.Item2 >= y.Item2), $"{found}");
    }

    /// <summary>The edu device in its own server, which the VM reaches over a socket.</summary>
    private sealed class ServedEdu : IDisposable
    {
        private readonly IVfioUserBackend _device = new PciDeviceType<EduPlugin>(new EduDeviceFactory()).Create(DeviceOptions.Parse("edu"));
        private readonly VfioUserServer _server;

        internal ServedEdu(string path)
        {
            Option = $"vfio-user-pci,id=edu,socket={path}";
            _server = new VfioUserServer(_device);
            _server.Listen(path);
        }

        internal string Option { get; }

        public void Dispose()
        {
            _server.Dispose();
            _device.Dispose();
        }
    }

    private static KvmGuest Waiting()
    {
        var guest = new KvmGuest(DevCheckGuest.BuildWaiting());
        guest.Vm.Cont();
        KvmGuest.WaitFor(() => Found(guest).Rounds == 1, "the guest waits");
        return guest;
    }

    private static DevCheckGuest.Found Found(KvmGuest guest) => DevCheckGuest.Read(guest.Vm.Memory);

    private static void Set(KvmGuest guest, IMsiRoute route, MsiMessage? message)
    {
        using (guest.Vm.Bql.Acquire()) route.Set(message);
    }

    private static bool IsReadable(OwnedFd fd) => (Posix.Poll(fd, Posix.POLLIN, null, 0, out _) & Posix.POLLIN) != 0;
}
