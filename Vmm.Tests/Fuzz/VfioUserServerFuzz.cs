using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tools.Devices;
using static Vmm.Tests.Support.RawVfioUserClient;

namespace Vmm.Tests.Fuzz;

/// <summary>
/// Hostile clients send wrong sizes, orders, fields and descriptors. The vfio-user server must answer or close the connection, never fault or
/// hang, and serve the next client as if nothing had happened (vfio-user 12, 14).
/// </summary>
[TestFixture, Parallelizable(ParallelScope.All)]
internal sealed class VfioUserServerFuzz
{
    private static readonly VfioUserCommand[] s_commands = [.. Enum.GetValues<VfioUserCommand>(), (VfioUserCommand)0, (VfioUserCommand)19];

    /// <summary>Valid requests, which a test then damages.</summary>
    private static byte[][] Good(VfioUserCommand command) => command switch
    {
        VfioUserCommand.DmaMap => [MapRequest(0x1000, 0x1000), MapRequest(0x2000, 0x1000, 0x1000, 11), MapRequest(0x10000, 0x3000, flags: 1)],
        VfioUserCommand.DmaUnmap => [UnmapRequest(0x1000, 0x1000), UnmapRequest(0, 0, 2), Bytes(48, 1, 0x1000UL, 0x1000UL, 4096UL, 8UL)],
        VfioUserCommand.DeviceGetInfo or VfioUserCommand.DeviceGetIrqInfo or VfioUserCommand.DeviceGetRegionIoFds => [Bytes(16, 0, 0, 0), Bytes(16, 0, 2, 0)],
        VfioUserCommand.DeviceGetRegionInfo => [Bytes(32, 0, 1, 0, 0UL, 0UL), Bytes(80, 0, 1, 0, 0UL, 0UL), Bytes(48, 0, 9, 0, 0UL, 0UL)],
        VfioUserCommand.DeviceSetIrqs => [Bytes(20, 0x24, 2, 0, 2), Bytes(20, 0x21, 0, 0, 0), Bytes(22, 0x22, 1, 0, 2, (byte)1, (byte)1), Bytes(20, 0x11, 0, 0, 1)],
        VfioUserCommand.RegionRead => [Bytes(0UL, 0u, 4), Bytes(0UL, 7u, 256), Bytes(8UL, 9u, 8), Bytes(16UL, 9u, 8), Bytes(24UL, 9u, 8), Bytes(0x1000UL, 9u, 64)],
        VfioUserCommand.RegionWrite => [Bytes(0UL, 0u, 4, 1), Bytes(0UL, 9u, 4, 3), Bytes(0UL, 9u, 4, 4), Bytes(0UL, 9u, 4, 1), Bytes(0x1000UL, 9u, 4, 1), Bytes(24UL, 9u, 8, 4UL)],
        VfioUserCommand.RegionWriteMulti => [Bytes(2UL, 0UL, 0u, 4, 1UL, 8UL, 0u, 8, 2UL)],
        VfioUserCommand.DirtyPages => [Bytes(8, 1), Bytes(8, 2), Bytes(48, 4, 0x1000UL, 0x1000UL, 4096UL, 8UL)],
        VfioUserCommand.DeviceFeature => [Bytes(16, 0x10001), Bytes(24, 0x20006, 4096UL, 0, 0), ReportRequest(0x1000, 0x1000, 4096), .. Enumerable.Range(0, 8).Select(static s => Bytes(16, 0x20002, s, -1))],
        VfioUserCommand.MigDataRead => [Bytes(1032, 1024), Bytes(8, 0)],
        VfioUserCommand.MigDataWrite => [Bytes(16, 8, 1UL), Bytes(8, 0)],
        VfioUserCommand.Version => [Version(Json), Version("{}")],
        _ => [[]],
    };

    [TestCase(1, 40, 250)]
    [TestCase(2, 40, 250)]
    public void HostileMessagesAreAnsweredOrEndTheConnection(int seed, int sessions, int messages)
    {
        var random = new Random(seed);
        using var served = new ServedDevice(new FakeVfioUserBackend(), new VfioUserServerOptions { LegacyMigrationRegion = true, QuiesceTimeout = TimeSpan.FromSeconds(1) });
        using var ram = new VfioUserMemory("fuzz", 0x4000);
        int asked = 0, ended = 0;
        for (int session = 0; session < sessions; session++)
        {
            using RawVfioUserClient client = served.Attach();
            for (int i = 0; i < messages; i++)
            {
                asked++;
                if (One(client, random, ram)) continue;
                ended++;
                break;
            }
        }
        TestContext.Out.WriteLine($"seed {seed}: {asked} messages, {ended} connections ended by the server, {served.Server.Stats}");
        Assert.That(served.Server.Stats.Messages, Is.GreaterThan(asked / 2));
        using RawVfioUserClient last = served.Attach();
        last.Ok(VfioUserCommand.DeviceReset, []);
        Assert.That(last.State, Is.EqualTo(VfioDeviceState.Running));
    }

    /// <summary>
    /// Sends VMM_FUZZ_MESSAGES messages (default 20,000) to a fake device and to a PCI device: neither descriptors nor memory may grow.
    /// The long run: <c>VMM_FUZZ_MESSAGES=1000000 dotnet test Vmm.Tests -c Release --filter TestCategory=fuzz-long</c>.
    /// </summary>
    [Test, NonParallelizable, Category("fuzz-long"), CancelAfter(1_800_000)]
    public void ManyHostileMessagesLeaveNothingBehind()
    {
        int messages = int.TryParse(Environment.GetEnvironmentVariable("VMM_FUZZ_MESSAGES"), out int wanted) ? wanted : 20_000;
        int seed = int.TryParse(Environment.GetEnvironmentVariable("VMM_FUZZ_SEED"), out wanted) ? wanted : 11;
        var random = new Random(seed);
        var options = new VfioUserServerOptions { LegacyMigrationRegion = true };
        using var fake = new ServedDevice(new FakeVfioUserBackend(), options);
        using var edu = new ServedDevice(new PciDeviceType<EduPlugin>(new EduDeviceFactory()).Create(DeviceOptions.Parse("edu")), options);
        using var ram = new VfioUserMemory("fuzz", 0x4000);
        Run(messages / 10);
        (int Fds, long Heap, long Resident) before = Usage();
        long ended = Run(messages);
        (int Fds, long Heap, long Resident) after = Usage();
        TestContext.Out.WriteLine($"seed {seed}: {messages} messages, {ended} connections ended by the server; descriptors {before.Fds} -> {after.Fds}, heap {before.Heap >> 10} -> {after.Heap >> 10} KiB, resident {before.Resident >> 20} -> {after.Resident >> 20} MiB");
        Assert.That(after.Fds, Is.LessThanOrEqualTo(before.Fds), "descriptors");
        Assert.That(after.Heap - before.Heap, Is.LessThan(4 << 20), "bytes of heap");
        Assert.That(after.Resident - before.Resident, Is.LessThan(200L << 20), "bytes of resident memory");

        long Run(int count)
        {
            long closed = 0;
            for (int sent = 0; sent < count;)
            {
                using RawVfioUserClient client = (random.Next(2) == 0 ? fake : edu).Attach();
                for (int i = 0; i < 250 && sent < count; i++, sent++)
                {
                    if (One(client, random, ram)) continue;
                    closed++;
                    break;
                }
            }
            foreach (ServedDevice served in (ServedDevice[])[fake, edu])
            {
                using RawVfioUserClient last = served.Attach();
                last.Ok(VfioUserCommand.DeviceReset, []);
                Assert.That(last.State, Is.EqualTo(VfioDeviceState.Running));
            }
            fake.Ended();
            edu.Ended();
            return closed;
        }
    }

    private static (int Fds, long Heap, long Resident) Usage()
    {
        for (int i = 0; i < 3; i++)
        {
            GC.Collect(GC.MaxGeneration, GCCollectionMode.Aggressive, blocking: true, compacting: true);
            GC.WaitForPendingFinalizers();
        }
        using var me = System.Diagnostics.Process.GetCurrentProcess();
        return (LeakCheck.Descriptors().Count, GC.GetTotalMemory(forceFullCollection: true), me.WorkingSet64);
    }

    /// <summary>Sends one message; false when the server closed the connection.</summary>
    private static bool One(RawVfioUserClient client, Random random, VfioUserMemory ram)
    {
        VfioUserCommand command = s_commands[random.Next(s_commands.Length)];
        byte[][] good = Good(command);
        byte[] payload = [.. good[random.Next(good.Length)]];
        if (random.Next(3) != 0) payload = Spoil(payload, random);
        uint flags = random.Next(12) switch { 0 => VfioUserHeader.NoReply, 1 => (uint)random.Next(64), _ => 0 };
        uint size = (uint)payload.Length + VfioUserHeader.Length;
        bool liesAboutSize = random.Next(150) == 0;
        if (liesAboutSize) size = random.Next(2) == 0 ? (uint)random.Next(16) : uint.MaxValue - (uint)random.Next(1 << 20);
        byte[] message = new byte[VfioUserHeader.Length + payload.Length];
        new VfioUserHeader((ushort)random.Next(4), command, size, flags, Errno.None).Write(message);
        payload.CopyTo(message, VfioUserHeader.Length);
        OwnedFd[] fds = [.. Enumerable.Range(0, random.Next(4) == 0 ? random.Next(17) : command == VfioUserCommand.DmaMap ? 1 : 0).Select(_ => ram.Fd)];
        try
        {
            client.SendRaw(message, fds);
            if ((flags & VfioUserHeader.NoReply) != 0 && !liesAboutSize) return true;
            using VfioUserReply? reply = client.ReceiveOrEnd();
            if (reply is null) return false;
            Assert.That(reply.Header.IsReply);
            Assert.That(reply.Header.IsError, Is.False.Or.EqualTo(reply.Payload.Length == 0));
            return !liesAboutSize;
        }
        catch (ChannelException)
        {
            return false;
        }
    }

    private static byte[] Spoil(byte[] payload, Random random)
    {
        if (payload.Length == 0) return new byte[random.Next(64)];
        switch (random.Next(4))
        {
            case 0:
                return payload[..random.Next(payload.Length)];
            case 1:
                byte[] longer = new byte[payload.Length + random.Next(1, 5000)];
                payload.CopyTo(longer, 0);
                return longer;
            default:
                ulong[] values = [0, 1, 7, 0xff, 0x1000, 0x7fffffff, 0xffffffff, ulong.MaxValue, 1UL << 63, (ulong)random.NextInt64()];
                byte[] field = BitConverter.GetBytes(values[random.Next(values.Length)]);
                int at = random.Next(payload.Length) & ~3, n = Math.Min(random.Next(2) == 0 ? 4 : 8, payload.Length - at);
                field.AsSpan(0, n).CopyTo(payload.AsSpan(at));
                return payload;
        }
    }
}
