using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Client;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Support;

namespace Vmm.Tests.GoldenTests;

/// <summary>
/// Replays recorded conversations of foreign clients with foreign servers, of both migration protocols. The test makes our client act as the
/// foreign client did and answers it with the recorded bytes; the client must send the recorded requests and understand the answers.
/// </summary>
[TestFixture]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
public sealed class VfioUserClientReplayTests : IDisposable
{
    private readonly GuestMemory _backing = new();
    private readonly List<OwnedFd> _eventFds = [];
    private readonly List<GuestMemorySection> _sections = [];
    private VfioUserDeviceIo _io = null!;
    private IVfioMigrationData? _session;

    /// <summary>
    /// Arguments: capture, count of requests, count of requests left out. Our client never sends the latter: unmap with a bitmap, unmap of
    /// everything, a report in another page size. GET MIGRATION is not among the requests: our client sends it when it opens the device.
    /// </summary>
    [TestCase("qemu-gpio-boot", 277, 0)]
    [TestCase("qemu-gpio-migrate-src", 1138, 0)]
    [TestCase("qemu-gpio-migrate-dst", 722, 0)]
    [TestCase("qemu-msix-intx-dma", 67, 0)]
    [TestCase("qemu-sparse-mmap", 34, 0)]
    [TestCase("qemu-write-multi", 1624, 0)]
    [TestCase("sample-v2-src", 79, 0)]
    [TestCase("sample-v2-dst", 26, 1)]
    [TestCase("sample-v1-src", 65, 0)]
    [TestCase("sample-v1-dst", 18, 1)]
    [TestCase("probe-gpio-features", 15, 2)]
    [TestCase("probe-gpio-resume", 4, 0)]
    public void TheClientSendsWhatWasRecordedAndUnderstandsTheAnswers(string name, int requests, int leftOut)
    {
        _backing.AddBlock(new RamBlockOptions { Name = "shared", SizeBytes = 256 << 20 });
        RamBlock messages = _backing.AddBlock(new RamBlockOptions { Name = "messages", SizeBytes = 256 << 20, IsShared = false });
        using var memory = new GuestMemory();
        using var replay = new VfioUserReplay(name, _backing);
        int played = 0, skipped = 0;
        using (_io = VfioUserDeviceIo.Open(new VfioUserOptions { SocketPath = name }, memory, replay.Server.ClientSocket))
        {
            Assert.That(replay.MigrationAsked, Is.EqualTo(replay.MigrationExpected));
            foreach (CapturedStep step in replay.Steps)
            {
                Action? act = Action(step, messages);
                if (VfioUserReplay.IsGetMigration(step))
                {
                    // The client answers it from what it learned when it opened the device.
                    act!();
                    continue;
                }
                if (act is null)
                {
                    if (!IsAttach(step.Request.Command)) skipped++;
                    continue;
                }
                replay.Play(step, act);
                played++;
            }
            Assert.That(_io.LostReason, Is.Null);
            if (name is "sample-v1-src" or "sample-v2-src")
                Assert.That(_io.GetRegionInfo(1).Areas, Is.EqualTo((VfioRegionArea[])[new(0, 0x1000), new(0x2000, 0x1000)]));
            if (name == "sample-v1-src")
                Assert.That((_io.GetRegionInfo(9).Type, _io.GetRegionInfo(9).Subtype, _io.GetRegionInfo(9).Areas[0].OffsetBytes), Is.EqualTo((VfioPciRegion.MigrationType, VfioPciRegion.MigrationSubtype, 0x1000)));
        }
        TestContext.Out.WriteLine($"{name}: {played} requests replayed, {skipped} left out");
        Assert.That((played, skipped), Is.EqualTo((requests, leftOut)));
    }

    public void Dispose()
    {
        foreach (OwnedFd fd in _eventFds) fd.Dispose();
        _backing.Dispose();
    }

    private static bool IsAttach(VfioUserCommand command) =>
        command is VfioUserCommand.Version or VfioUserCommand.DeviceGetInfo or VfioUserCommand.DeviceGetRegionInfo or VfioUserCommand.DeviceGetIrqInfo;

    /// <summary>The call that makes our client send the recorded request, and the check of its result; null when our client never sends it.</summary>
    private Action? Action(CapturedStep step, RamBlock messages)
    {
        byte[] body = step.Request.Body;
        Errno expected = step.Reply?.Header.Errno ?? Errno.None;
        byte[] answer = step.Reply?.Body ?? [];
        switch (step.Request.Command)
        {
            case VfioUserCommand.RegionRead:
                return () => ReadRegion(body, answer, expected);
            case VfioUserCommand.RegionWrite:
                return () => WriteRegion(body, step.Request.Header.WantsNoReply, expected);
            case VfioUserCommand.RegionWriteMulti:
                return () => WriteMany(body);
            case VfioUserCommand.DeviceSetIrqs:
                return () => SetIrqs(body, step.Request.Fds, expected);
            case VfioUserCommand.DeviceReset:
                return () => Assert.That(_io.Reset(), Is.EqualTo(expected));
            case VfioUserCommand.DmaMap:
                return () => Map(body, step.Request.Fds > 0 ? _backing.Blocks[0] : messages);
            case VfioUserCommand.DmaUnmap when LittleEndian.U32(body, 4) == 0:
                return () => Unmap(body);
            case VfioUserCommand.DirtyPages:
                return () => DirtyPages(body, answer, expected);
            case VfioUserCommand.DeviceFeature:
                return Feature(body, answer, expected);
            case VfioUserCommand.MigDataRead:
                return () =>
                {
                    byte[] buffer = new byte[LittleEndian.U32(body, 4)];
                    int n = _session!.Read(buffer, out Errno errno);
                    Assert.That((n, errno), Is.EqualTo(((int)LittleEndian.U32(answer, 4), expected)));
                    Assert.That(buffer[..n], Is.EqualTo(answer[8..(8 + n)]));
                };
            case VfioUserCommand.MigDataWrite:
                return () => Assert.That((_session!.Write(body.AsSpan(8), out Errno errno), errno), Is.EqualTo((expected == Errno.None ? body.Length - 8 : -1, expected)));
            default:
                return null;
        }
    }

    private void ReadRegion(byte[] body, byte[] answer, Errno expected)
    {
        VfioUserRegionAccess.TryRead(body, out VfioUserRegionAccess access);
        byte[] data = new byte[access.Count];
        Assert.That(_io.RegionRead(access.Region, access.Offset, data), Is.EqualTo(expected));
        if (expected == Errno.None) Assert.That(data, Is.EqualTo(answer[16..]));
    }

    private void WriteRegion(byte[] body, bool posted, Errno expected)
    {
        VfioUserRegionAccess.TryRead(body, out VfioUserRegionAccess access);
        // The device allows DMA by the bus-master bit of the command register, so the client must know each write of it.
        if (access is { Region: VfioPciRegion.Config, Offset: 4 }) _io.SetBusMaster((body[16] & 4) != 0);
        // The sample client never writes the command register, yet its device does DMA.
        if (_io.Name.StartsWith("sample", StringComparison.Ordinal)) _io.SetBusMaster(true);
        Assert.That(_io.RegionWrite(access.Region, access.Offset, body.AsSpan(16), posted), Is.EqualTo(expected));
    }

    private void WriteMany(byte[] body)
    {
        for (int i = 0; i < (int)VfioUserWriteMulti.ReadCount(body); i++)
        {
            VfioUserRegionAccess access = VfioUserWriteMulti.ReadEntry(body.AsSpan(8 + (24 * i), 24), out ReadOnlySpan<byte> data);
            Assert.That(_io.RegionWrite(access.Region, access.Offset, data, posted: true), Is.EqualTo(Errno.None));
        }
    }

    private void SetIrqs(byte[] body, int fds, Errno expected)
    {
        if (_io.Name.StartsWith("sample", StringComparison.Ordinal)) _io.SetBusMaster(true);
        VfioUserIrqSet.TryRead(body, out VfioUserIrqSet set);
        OwnedFd?[] vectors = set.Flags.HasFlag(VfioIrqSetFlags.DataEventFd) ? new OwnedFd?[set.Count] : [];
        for (int i = 0; i < fds; i++) _eventFds.Add(vectors[i] = Posix.EventFd());
        Assert.That(_io.SetIrqs(new VfioIrqSet(set.Flags, set.Index, set.Start, set.Count), body.AsSpan(20), vectors), Is.EqualTo(expected));
    }

    private void Map(byte[] body, RamBlock block)
    {
        VfioUserDmaMap.TryRead(body, out VfioUserDmaMap map);
        var section = new GuestMemorySection(new GuestRange(new GuestAddress(map.Address), map.Size), block, map.Address % block.SizeBytes, (map.Flags & VfioUserDmaMap.FlagWrite) == 0);
        _sections.Add(section);
        _io.Container.SectionAdded(section);
    }

    private void Unmap(byte[] body)
    {
        VfioUserDmaUnmap.TryRead(body, out VfioUserDmaUnmap unmap);
        GuestMemorySection section = _sections.Single(s => s.Range == new GuestRange(new GuestAddress(unmap.Address), unmap.Size));
        _sections.Remove(section);
        _io.Container.SectionRemoved(section);
    }

    private void DirtyPages(byte[] body, byte[] answer, Errno expected)
    {
        if (body.Length == 8)
        {
            Assert.That(LittleEndian.U32(body, 4) == VfioUserDirtyPages.Start ? _io.Container.StartDirtyLog() : _io.Container.StopDirtyLog(), Is.EqualTo(expected));
            return;
        }
        VfioUserDirtyRange.TryRead(body.AsSpan(8), out VfioUserDirtyRange range);
        ulong[] bits = new ulong[range.Bitmap.Bytes / 8];
        Assert.That(_io.Container.GetDirtyBitmap(new GuestRange(new GuestAddress(range.Iova), range.Size), bits), Is.EqualTo(expected));
        Assert.That(bits[0], Is.EqualTo(LittleEndian.U64(answer, 40)));
    }

    private Action? Feature(byte[] body, byte[] answer, Errno expected)
    {
        VfioUserFeature.TryRead(body, out VfioUserFeature feature);
        switch (feature.Feature)
        {
            case VfioDeviceFeature.MigDeviceState when feature.Op == VfioFeatureOp.Set:
                return () =>
                {
                    Assert.That(_io.SetMigrationState((VfioDeviceState)LittleEndian.U32(body, 8), out IVfioMigrationData? session), Is.EqualTo(expected));
                    _session = session ?? _session;
                };
            case VfioDeviceFeature.DmaLoggingStart:
                VfioUserLogStart.TryRead(body.AsSpan(8), out VfioUserLogStart start);
                GuestRange[] ranges = [.. Enumerable.Range(0, (int)start.NumRanges).Select(i => new GuestRange(new GuestAddress(LittleEndian.U64(body, 24 + (16 * i))), LittleEndian.U64(body, 32 + (16 * i))))];
                return () =>
                {
                    Assert.That(_io.StartDmaLog(start.PageSize, ranges, out ulong inForce), Is.EqualTo(expected));
                    Assert.That(inForce, Is.EqualTo(start.PageSize));
                };
            case VfioDeviceFeature.DmaLoggingStop:
                return () => Assert.That(_io.StopDmaLog(), Is.EqualTo(expected));
            case VfioDeviceFeature.DmaLoggingReport:
                VfioUserLogReport.TryRead(body.AsSpan(8), out VfioUserLogReport report);
                if (report.PageSize != 4096) return null; // vfio-user C-15 forbids another page size to our client.
                return () =>
                {
                    ulong[] bits = new ulong[VfioUserBitmap.BytesFor(report.Size, report.PageSize) / 8];
                    Assert.That(_io.ReportDmaLog(new GuestRange(new GuestAddress(report.Iova), report.Size), report.PageSize, bits), Is.EqualTo(expected));
                    for (int i = 0; i < bits.Length; i++) Assert.That(bits[i], Is.EqualTo(LittleEndian.U64(answer, 32 + (8 * i))));
                };
            default:
                byte[] data = new byte[Math.Max(answer.Length, 8) - 8];
                return () =>
                {
                    Assert.That(_io.DeviceFeature(feature.Feature, feature.Op, data), Is.EqualTo(expected));
                    Assert.That(data, Is.EqualTo(answer[8..]));
                };
        }
    }
}
