using System.Globalization;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tools.Devices;

namespace Vmm.Tests.GoldenTests;

/// <summary>
/// Replays recorded conversations of foreign clients with foreign servers. Our server has the same device and gets the recorded requests, with
/// real descriptors of the recorded kinds and sizes. It must send the recorded replies and requests wherever the protocol fixes them;
/// <see cref="Difference"/> and <see cref="Mask"/> list what the protocol leaves open.
/// </summary>
[TestFixture]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
internal sealed class VfioUserServerReplayTests : IDisposable
{
    /// <summary>
    /// Messages by which the v1 client reads the device after the stop. The server chooses the size of its chunks, so the test reads our chunks
    /// instead: their last bytes must be the recorded state.
    /// </summary>
    private const int V1RestFirst = 172, V1RestLast = 180, V1RestData = 179;

    private readonly List<OwnedFd> _fds = [];
    private ManualTimeProvider _time = new();
    private string _name = "";
    private bool _isStopCopy;

    /// <summary>Arguments: capture, count of requests, count of the server's requests. Replies must agree in all bytes that <see cref="Mask"/> keeps.</summary>
    [TestCase("qemu-gpio-boot", 287, 0)]
    [TestCase("qemu-gpio-migrate-src", 1148, 0)]
    [TestCase("qemu-gpio-migrate-dst", 732, 0)]
    [TestCase("qemu-msix-intx-dma", 78, 3)]
    [TestCase("qemu-sparse-mmap", 45, 0)]
    [TestCase("qemu-write-multi", 1634, 0)]
    [TestCase("sample-v2-src", 96, 8)]
    [TestCase("sample-v2-dst", 33, 8)]
    [TestCase("sample-v1-src", 79, 8)]
    [TestCase("sample-v1-dst", 25, 8)]
    [TestCase("probe-gpio-features", 19, 0)]
    [TestCase("probe-gpio-resume", 5, 0)]
    public void TheServerRepliesWhatWasRecorded(string name, int requests, int serverRequests)
    {
        _name = name;
        List<CapturedMessage> capture = VfioUserCapture.Read(name);
        // The clock starts one second before the sample client's first timer is due.
        _time = new ManualTimeProvider { UtcStart = DateTimeOffset.FromUnixTimeSeconds(name.StartsWith("sample-v1", StringComparison.Ordinal) ? 0x6b00e158 : 0x6b00e0ec) };
        using var served = new ServedDevice(Device(), new VfioUserServerOptions { LegacyMigrationRegion = name.StartsWith("sample-v1", StringComparison.Ordinal), TwinSocket = false });
        int played = 0, asked = 0, outcomeOnly = 0;
        using (RawVfioUserClient client = served.Connect())
        {
            foreach (CapturedStep step in VfioUserCapture.Steps(capture))
            {
                if (name == "sample-v1-src" && step.Request.Number is >= V1RestFirst and <= V1RestLast)
                {
                    if (step.Request.Number == V1RestFirst) ReadV1Rest(client, capture);
                    continue;
                }
                string what = $"message {step.Request.Number} ({step.Request.Command})";
                OwnedFd[] fds = [.. step.Request.FdKinds.Select(Descriptor)];
                client.Send(step.Request.Command, step.Request.Body, fds, step.Request.Header.Flags, step.Request.Header.Id);
                played++;
                if (step.Reply is not null)
                {
                    using VfioUserReply reply = client.Receive();
                    if (!Compare(step, reply, what)) outcomeOnly++;
                }
                CapturedMessage[] commands = [.. step.After.Where(static m => !m.FromClient)];
                if (commands.Length > 0) Answer(served, client, step, commands);
                asked += commands.Length;
            }
            Assert.That(client.HasNothingToRead, "the server sent more than was recorded");
        }
        TestContext.Out.WriteLine($"{name}: {played} requests, {outcomeOnly} of them compared in outcome only, {asked} requests of the server");
        Assert.That((played, asked), Is.EqualTo((requests, serverRequests)));
    }

    public void Dispose()
    {
        foreach (OwnedFd fd in _fds) fd.Dispose();
    }

    private IVfioUserBackend Device() => _name switch
    {
        "qemu-msix-intx-dma" => new ScratchVfioUserBackend(0x4000, hasMsix: true, isMappable: false).Build(),
        "qemu-sparse-mmap" => new ScratchVfioUserBackend(0x4000, hasMsix: false, isMappable: true).Build(),
        "qemu-write-multi" => new ScratchVfioUserBackend(0x1000, hasMsix: false, isMappable: false).Build(),
        _ when _name.StartsWith("sample", StringComparison.Ordinal) => new SampleDevice(_time),
        _ => new GpioDevice(),
    };

    private OwnedFd Descriptor(string kind)
    {
        OwnedFd fd = kind == "eventfd" ? Posix.EventFd() : Posix.MemFd("capture", long.Parse(kind.Split(" 0x")[1], NumberStyles.HexNumber, CultureInfo.InvariantCulture));
        _fds.Add(fd);
        return fd;
    }

    /// <summary>Compares a reply with the recorded one; false when only their outcomes are comparable.</summary>
    private bool Compare(CapturedStep step, VfioUserReply reply, string what)
    {
        CapturedMessage recorded = step.Reply!;
        Assert.That((reply.Header.Command, reply.Header.Id), Is.EqualTo((recorded.Command, recorded.Header.Id)), what);
        string? difference = Difference(step);
        if (step.Request.Command == VfioUserCommand.DeviceFeature && step.Request.Body[4] == 2 && step.Request.Body[6] == 2) _isStopCopy = step.Request.Body[8] == (byte)VfioDeviceState.StopCopy;
        if (difference is not null)
        {
            Assert.That(reply.Header.Errno, Is.EqualTo(Errno.None), $"{what}: {difference}");
            return false;
        }
        Assert.That((reply.Header.Flags, reply.Header.Errno, reply.Fds.Count), Is.EqualTo((recorded.Header.Flags, recorded.Header.Errno, recorded.Fds)), what);
        Assert.That(Mask(step, reply.Payload), Is.EqualTo(Mask(step, Expected(step))), what);
        return true;
    }

    /// <summary>The reason why a reply may differ from the recorded one; null when it must agree.</summary>
    private string? Difference(CapturedStep step)
    {
        byte[] body = step.Request.Body;
        switch (step.Request.Command)
        {
            case VfioUserCommand.Version:
                return "the JSON is each server's own";
            case VfioUserCommand.RegionWrite when step.Reply!.Header.IsError && body[8] == VfioPciRegion.Config:
                return "libvfio-user refuses writes to config bits it does not know; an access inside a region must not fail (vfio-user S-15)";
            case VfioUserCommand.MigDataWrite when step.Reply!.Header.IsError:
                return "the GPIO sample refuses the data that it applies";
            case VfioUserCommand.DeviceGetRegionInfo when body[8] == VfioPciRegion.FirstDeviceSpecific:
                return "size and data area of the v1 region are the server's choice";
            default:
                return null;
        }
    }

    /// <summary>
    /// The recorded reply, with what ours says on purpose: libvfio-user offers only eventfds for INTx, our server says also that INTx can be masked
    /// and masks itself when it signals, as the kernel's does. An irqfd with resampling needs to know that.
    /// </summary>
    private static byte[] Expected(CapturedStep step)
    {
        byte[] copy = [.. step.Reply!.Body];
        if (step.Request.Command == VfioUserCommand.DeviceGetIrqInfo && VfioUserIrqInfo.TryRead(copy, out VfioUserIrqInfo info) && info.Index == VfioPciIrq.Intx)
            (info with { Flags = info.Flags | (uint)(VfioIrqInfoFlags.Maskable | VfioIrqInfoFlags.AutoMasked) }).Write(copy);
        return copy;
    }

    /// <summary>Clears the bytes of a reply that the protocol leaves open.</summary>
    private byte[] Mask(CapturedStep step, byte[] payload)
    {
        byte[] copy = [.. payload];
        byte[] body = step.Request.Body;
        if (step.Request.Command == VfioUserCommand.RegionRead && copy.Length > 16)
        {
            VfioUserRegionAccess.TryRead(body, out VfioUserRegionAccess access);
            // libvfio-user sets the I/O bit in the registers of BARs that do not exist.
            if (access is { Region: VfioPciRegion.Config, Offset: 0, Count: > 0x28 })
                for (int i = 0; i < 6; i++) copy[16 + 0x10 + (4 * i)] &= 0xfe;
            // The recorded chunk is the live BAR1, which still changed; our chunk stays the same once its size was reported (vfio-user S-46).
            if (access is { Region: VfioPciRegion.FirstDeviceSpecific, Offset: 0x1000 }) copy.AsSpan(16).Clear();
            // The sample's BAR0 counts seconds, which differ in each run.
            if (access.Region == 0 && _name.StartsWith("sample", StringComparison.Ordinal)) copy.AsSpan(16).Clear();
        }
        // In PRE_COPY the client was still writing to BAR1, and the capture does not contain all of those writes.
        if (step.Request.Command == VfioUserCommand.MigDataRead && !_isStopCopy && _name.StartsWith("sample", StringComparison.Ordinal)) copy.AsSpan(8).Clear();
        return copy;
    }

    /// <summary>Receives the server's own requests and answers them with the recorded replies.</summary>
    private void Answer(ServedDevice served, RawVfioUserClient client, CapturedStep step, CapturedMessage[] commands)
    {
        Task device = Task.CompletedTask;
        if (_name.StartsWith("sample", StringComparison.Ordinal)) _time.Advance(TimeSpan.FromSeconds(_name.EndsWith("src", StringComparison.Ordinal) ? 2 : 100));
        else device = WorkerThread.Run("scratch", () => DriveScratch(served, commands));
        foreach (CapturedMessage command in commands)
        {
            CapturedMessage recorded = step.After.First(a => a.FromClient && a.Header.Id == command.Header.Id && a.Command == command.Command);
            using VfioUserReply request = client.Receive();
            Assert.That((request.Header.Command, request.Header.IsCommand), Is.EqualTo((command.Command, true)));
            Assert.That(request.Payload, Is.EqualTo(command.Body), $"message {command.Number}");
            byte[] answer = [.. recorded.Bytes];
            new VfioUserHeader(request.Header.Id, recorded.Command, recorded.Header.SizeBytes, recorded.Header.Flags, recorded.Header.Errno).Write(answer);
            client.SendRaw(answer);
        }
        Assert.That(device.Wait(TimeSpan.FromSeconds(20)));
    }

    private static void ReadV1Rest(RawVfioUserClient client, List<CapturedMessage> capture)
    {
        var data = new List<byte>();
        while (client.Read64(VfioPciRegion.FirstDeviceSpecific, 8) > 0)
        {
            ulong at = client.Read64(VfioPciRegion.FirstDeviceSpecific, 16), bytes = client.Read64(VfioPciRegion.FirstDeviceSpecific, 24);
            data.AddRange(client.RegionRead(VfioPciRegion.FirstDeviceSpecific, at, (int)bytes));
        }
        byte[] recorded = capture.Single(static m => m.Number == V1RestData).Body[16..];
        Assert.That(data[^recorded.Length..], Is.EqualTo(recorded));
    }

    /// <summary>Does the transfers that the scratch server's user typed in, because no message in the capture asks for them.</summary>
    private static void DriveScratch(ServedDevice served, CapturedMessage[] commands)
    {
        foreach (CapturedMessage command in commands)
        {
            VfioUserDmaAccess.TryRead(command.Body, out VfioUserDmaAccess access);
            IDmaMessages messages = served.Device.Dma.Messages!;
            if (command.Command == VfioUserCommand.DmaWrite) messages.Write(access.Address, command.Body.AsSpan(16));
            else messages.Read(access.Address, new byte[access.Count]);
        }
    }
}
