using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Tests.Fakes;

namespace Vmm.Tests.Unit.Vfio;

/// <summary>The kernel backend's requests to a device, and how it reads the answers (vfio-migration 1.4 to 1.7, 1.11).</summary>
internal sealed class KernelDeviceIoTests
{
    private const string Address = "0000:00:01.0";
    private const long ConfigAt = 7L << FakeKernelDevice.RegionShift;
    private FakeVfioHost _host = null!;
    private FakeKernelDevice _device = null!;
    private KernelVfioDeviceIo? _opened;

    private KernelVfioDeviceIo Io => _opened ??= _host.Open($"host={Address}");

    [SetUp]
    public void SetUp()
    {
        _host = new FakeVfioHost();
        _device = _host.AddPci(Address);
    }

    [TearDown]
    public void TearDown()
    {
        _opened?.Dispose();
        _opened = null;
        Assert.That(_host.Kernel.OpenCount, Is.Zero);
        _host.Dispose();
    }

    [Test]
    public void A_region_is_absent_when_the_kernel_does_not_know_it_or_gives_it_no_size()
    {
        _device.Regions[0] = (3, 0, []);
        Assert.That(new[] { 0u, 1u, 8u, 9u, 10u, uint.MaxValue }.Select(i => Io.GetRegionInfo(i).IsPresent), Has.All.False);
        Assert.That(_host.Kernel.Calls.Count(static c => c == "device: GET_REGION_INFO"), Is.EqualTo(4), "the backend does not ask for regions beyond the device's count");
    }

    [Test]
    public void A_region_is_asked_for_once()
    {
        Assert.That(Io.GetRegionInfo(7).SizeBytes, Is.EqualTo(256));
        _ = Io.GetRegionInfo(7);
        Assert.That(_host.Kernel.Calls.Count(static c => c == "device: GET_REGION_INFO"), Is.EqualTo(1));
    }

    [Test]
    public void Another_error_than_invalid_is_not_an_absent_region()
    {
        _host.Kernel.Failures["GET_REGION_INFO"] = Errno.EIO;
        Assert.That(() => Io.GetRegionInfo(0), Throws.TypeOf<VfioException>().With.Message.Contains("region 0"));
    }

    [Test]
    public void A_mappable_region_without_capability_is_one_area()
    {
        _device.Regions[0] = (7, 0x4000, []);
        Assert.That(Io.GetRegionInfo(0).Areas, Is.EqualTo(new[] { new VfioRegionArea(0, 0x4000) }));
    }

    [TestCase(3u, 0x4000ul)]
    [TestCase(7u, 0x80ul)]
    public void A_region_that_is_not_mappable_or_below_a_page_has_no_area(uint flags, ulong size)
    {
        _device.Regions[0] = (flags, size, []);
        Assert.That(Io.GetRegionInfo(0).Areas, Is.Empty);
    }

    [Test]
    public void Capabilities_are_fetched_by_a_second_call_and_decoded()
    {
        _device.Regions[2] = (7, 0x10000, Caps(
            (3, []),
            (1, [.. U32(3, 0), .. U64(0x8000, 0x4000, 0x1000, 0, 0x1000, 0x2000)]),
            (2, U32(3, 1))));
        VfioRegionInfo info = Io.GetRegionInfo(2);
        Assert.Multiple(() =>
        {
            Assert.That(info.Areas, Is.EqualTo(new[] { new VfioRegionArea(0x8000, 0x4000), new VfioRegionArea(0x1000, 0x2000) }), "the areas keep their order, and the empty one is left out");
            Assert.That((info.Type, info.Subtype, info.IsMsixMappable), Is.EqualTo((3u, 1u, true)));
            Assert.That(info.Flags, Is.EqualTo(VfioRegionFlags.Read | VfioRegionFlags.Write | VfioRegionFlags.Mmap));
            Assert.That(_host.Kernel.Calls.Count(static c => c == "device: GET_REGION_INFO"), Is.EqualTo(2));
        });
    }

    private static IEnumerable<TestCaseData> BrokenCaps() =>
    [
        new TestCaseData(Link(9, 32)).SetArgDisplayNames("a link to itself"),
        new TestCaseData(Link(9, 36)).SetArgDisplayNames("a link to a header that is cut off"),
        new TestCaseData(Link(9, 0x7fffffff)).SetArgDisplayNames("a link far outside"),
        new TestCaseData(Link(9, -1)).SetArgDisplayNames("a link beyond all"),
        new TestCaseData(Caps((1, U32(1)))).SetArgDisplayNames("a sparse capability that is cut off"),
        new TestCaseData(Caps((1, [.. U32(2, 0), .. U64(0, 0x1000)]))).SetArgDisplayNames("more areas than there is room for"),
        new TestCaseData(Caps((1, [.. U32(uint.MaxValue, 0), .. U64(0, 0x1000)]))).SetArgDisplayNames("very many areas"),
        new TestCaseData(Caps((1, [.. U32(1, 0), .. U64(0xf000, 0x2000)]))).SetArgDisplayNames("an area that ends outside"),
        new TestCaseData(Caps((1, [.. U32(1, 0), .. U64(ulong.MaxValue - 0xfff, 0x2000)]))).SetArgDisplayNames("an area that wraps"),
        new TestCaseData(Caps((2, U32(1)))).SetArgDisplayNames("a type that is cut off"),
    ];

    [TestCaseSource(nameof(BrokenCaps))]
    public void A_malformed_capability_is_refused(byte[] caps)
    {
        _device.Regions[2] = (7, 0x10000, caps);
        Assert.That(() => Io.GetRegionInfo(2), Throws.TypeOf<VfioException>().With.Message.Contains("region 2").And.Property("Errno").EqualTo(Errno.EPROTO));
    }

    [TestCase(0ul, 16, new[] { 8, 8 })]
    [TestCase(4ul, 12, new[] { 4, 8 })]
    [TestCase(1ul, 7, new[] { 1, 2, 4 })]
    [TestCase(6ul, 3, new[] { 2, 1 })]
    [TestCase(3ul, 1, new[] { 1 })]
    [TestCase(0ul, 0, new int[0])]
    public void Accesses_are_as_wide_as_offset_and_length_allow(ulong offset, int length, int[] widths)
    {
        byte[] bytes = [.. Enumerable.Range(1, length).Select(static i => (byte)i)];
        Assert.That(Io.RegionWrite(7, offset, bytes), Is.EqualTo(Errno.None));
        Assert.That(_host.Kernel.Accesses.Select(static a => a.Length), Is.EqualTo(widths));
        byte[] back = new byte[length];
        Assert.That(Io.RegionRead(7, offset, back), Is.EqualTo(Errno.None));
        Assert.That(back, Is.EqualTo(bytes));
        Assert.That(_host.Kernel.Accesses.Select(static a => a.Offset).Distinct(), length == 0 ? Is.Empty : Has.Member(ConfigAt + (long)offset));
    }

    [TestCase(0u, 0ul, 1)]
    [TestCase(7u, 256ul, 1)]
    [TestCase(7u, 255ul, 2)]
    [TestCase(7u, ulong.MaxValue, 2)]
    public void An_access_outside_a_region_never_reaches_the_kernel(uint region, ulong offset, int length)
    {
        Assert.That((Io.RegionRead(region, offset, new byte[length]), Io.RegionWrite(region, offset, new byte[length])), Is.EqualTo((Errno.EINVAL, Errno.EINVAL)));
        Assert.That(_host.Kernel.Accesses, Is.Empty);
    }

    [Test]
    public void A_short_access_is_invalid_and_a_failed_one_keeps_its_errno()
    {
        _host.Kernel.Memory[ConfigAt] = [1, 2];
        Assert.That(Io.RegionRead(7, 0, new byte[4]), Is.EqualTo(Errno.EINVAL));
        _host.Kernel.Failures["pread"] = Errno.EIO;
        _host.Kernel.Failures["pwrite"] = Errno.EPERM;
        Assert.That((Io.RegionRead(7, 0, new byte[4]), Io.RegionWrite(7, 0, new byte[4])), Is.EqualTo((Errno.EIO, Errno.EPERM)));
    }

    [Test]
    public void An_area_is_mapped_at_its_place_with_the_regions_rights()
    {
        _device.Regions[2] = (5, 0x10000, Caps((1, [.. U32(1, 0), .. U64(0x8000, 0x4000)])));
        using MappedRegion? map = Io.MapArea(2, new VfioRegionArea(0x8000, 0x4000));
        Assert.That(map!.LengthBytes, Is.EqualTo(0x4000));
        Assert.That(map.IsWritable, Is.False);
        Assert.That(_host.Kernel.Calls[^1], Is.EqualTo("mmap 20000008000+4000 r"));
    }

    [Test]
    public void What_is_no_area_or_cannot_be_mapped_is_left_to_calls()
    {
        _device.Regions[2] = (7, 0x4000, []);
        Assert.That(Io.MapArea(2, new VfioRegionArea(0, 0x1000)), Is.Null);
        _host.Kernel.Failures["mmap 20000000000+4000 rw"] = Errno.ENOMEM;
        Assert.That(Io.MapArea(2, new VfioRegionArea(0, 0x4000)), Is.Null);
    }

    [Test]
    public void Interrupts_are_described_and_absent_ones_count_nothing()
    {
        Assert.That(Io.GetIrqInfo(2), Is.EqualTo(new VfioIrqInfo(VfioIrqInfoFlags.EventFd | VfioIrqInfoFlags.NoResize, 4)));
        Assert.That((Io.GetIrqInfo(3), Io.GetIrqInfo(5)), Is.EqualTo((default(VfioIrqInfo), default(VfioIrqInfo))));
        _host.Kernel.Failures["GET_IRQ_INFO"] = Errno.EIO;
        Assert.That(() => Io.GetIrqInfo(1), Throws.TypeOf<VfioException>());
    }

    [Test]
    public void Eventfds_follow_the_header_of_set_irqs()
    {
        using OwnedFd one = Posix.EventFd();
        VfioIrqSetFlags flags = VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionTrigger;
        Assert.That(Io.SetIrqs(new VfioIrqSet(flags, VfioPciIrq.Msix, 1, 2), [], [one, null]), Is.EqualTo(Errno.None));
        Assert.That(_device.IrqSets.Single(), Is.EqualTo(U32(28, 4 | 32, 2, 1, 2, (uint)one.Number, uint.MaxValue)));
        Assert.That(one.IsClosed, Is.False);
    }

    [Test]
    public void Bools_follow_the_header_and_nothing_else_does()
    {
        Io.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataBool | VfioIrqSetFlags.ActionMask, 2, 0, 3), [1, 0, 1], []);
        Io.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataNone | VfioIrqSetFlags.ActionTrigger, 2, 0, 0), [], []);
        Assert.That(_device.IrqSets, Is.EqualTo(new[] { (byte[])[.. U32(23, 2 | 8, 2, 0, 3), 1, 0, 1], U32(20, 1 | 32, 2, 0, 0) }));
    }

    [Test]
    public void Fewer_vectors_than_asked_for_is_a_failure()
    {
        _device.IrqResult = 3;
        Assert.That(Io.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataNone | VfioIrqSetFlags.ActionTrigger, 2, 0, 4), [], []), Is.EqualTo(Errno.ENOSPC));
        _host.Kernel.Failures["SET_IRQS"] = Errno.ENOTTY;
        Assert.That(Io.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataNone | VfioIrqSetFlags.ActionTrigger, 2, 0, 4), [], []), Is.EqualTo(Errno.ENOTTY));
    }

    [Test]
    public void A_feature_carries_its_data_both_ways()
    {
        _device.Features[1] = U64(7);
        byte[] data = new byte[8];
        Assert.That(Io.DeviceFeature(VfioDeviceFeature.Migration, VfioFeatureOp.Get, data), Is.EqualTo(Errno.None));
        Assert.That(data, Is.EqualTo(U64(7)));
        Assert.That(_device.FeatureCalls[^1].Flags, Is.EqualTo(0x10001));
        Assert.That(Io.DeviceFeature(VfioDeviceFeature.DmaLoggingStart, VfioFeatureOp.Probe | VfioFeatureOp.Set, []), Is.EqualTo(Errno.ENOTTY));
        Assert.That(_device.FeatureCalls[^1].Flags, Is.EqualTo(0x60006));
    }

    [Test]
    public void A_session_hands_out_its_data_descriptor_and_the_rest_none()
    {
        _device.MigState = (uint)VfioDeviceState.Running;
        KernelVfioDeviceIo io = Io;
        _device.GivesDataFd = true;
        Assert.That(io.SetMigrationState(VfioDeviceState.StopCopy, out IVfioMigrationData? data), Is.EqualTo(Errno.None));
        _device.GivesDataFd = false;
        Assert.That(io.SetMigrationState(VfioDeviceState.Stop, out IVfioMigrationData? none), Is.EqualTo(Errno.None));
        Assert.That(data, Is.Not.Null);
        Assert.That(none, Is.Null);
        Assert.That((io.GetMigrationState(out VfioDeviceState state), state), Is.EqualTo((Errno.None, VfioDeviceState.Stop)));
        data!.Dispose();
        _host.Kernel.Failures["FEATURE"] = Errno.EINVAL;
        Assert.That((io.SetMigrationState(VfioDeviceState.Running, out none), none), Is.EqualTo((Errno.EINVAL, (IVfioMigrationData?)null)));
        Assert.That(io.GetMigrationState(out _), Is.EqualTo(Errno.EINVAL));
    }

    [Test]
    public void Data_is_read_in_what_pieces_it_comes_and_its_errnos_are_kept()
    {
        using IVfioMigrationData data = Session();
        _host.Kernel.Data.Enqueue(([1, 2, 3], Errno.None));
        _host.Kernel.Data.Enqueue(([], Errno.ENOMSG));
        _host.Kernel.Data.Enqueue(([], Errno.ENODEV));
        _host.Kernel.Data.Enqueue(([], Errno.None));
        byte[] buffer = new byte[8];
        Assert.That((data.Read(buffer, out Errno errno), errno), Is.EqualTo((3, Errno.None)));
        Assert.That((data.Read(buffer, out errno), errno), Is.EqualTo((-1, Errno.ENOMSG)));
        Assert.That((data.Read(buffer, out errno), errno), Is.EqualTo((-1, Errno.ENODEV)));
        Assert.That((data.Read(buffer, out errno), errno), Is.EqualTo((0, Errno.None)));
        Assert.That((data.Write([4, 5], out errno), errno), Is.EqualTo((2, Errno.None)));
        Assert.That(_host.Kernel.Written.Single(), Is.EqualTo(new byte[] { 4, 5 }));
    }

    [TestCase(false)]
    [TestCase(true)]
    public void The_flags_of_the_precopy_info_count_only_once_the_device_was_told_to_fill_them(bool v2)
    {
        _device.Features[12] = [];
        if (v2) Assert.That(Io.DeviceFeature(VfioDeviceFeature.MigPrecopyInfoV2, VfioFeatureOp.Set, []), Is.EqualTo(Errno.None));
        using IVfioMigrationData data = Session();
        Assert.That((data.PrecopyInfo(out VfioPrecopyInfo info), info), Is.EqualTo((Errno.None, new VfioPrecopyInfo(24, 5, v2))));
        _host.Kernel.Failures["data: GET_PRECOPY_INFO"] = Errno.EINVAL;
        Assert.That((data.PrecopyInfo(out info), info), Is.EqualTo((Errno.EINVAL, default(VfioPrecopyInfo))));
    }

    [Test]
    public void The_dma_log_starts_with_its_ranges_and_reports_the_size_in_force()
    {
        _device.Features[6] = U64(0x2000);
        GuestRange[] ranges = [new(new GuestAddress(0), 0x10000), new(new GuestAddress(0x100000), 0x4000)];
        Assert.That((Io.StartDmaLog(4096, ranges, out ulong inForce), inForce), Is.EqualTo((Errno.None, 0x2000UL)));
        (uint flags, byte[] data, byte[] pointee) = _device.FeatureCalls[^1];
        Assert.That((flags, BinaryPrimitives.ReadUInt64LittleEndian(data), BinaryPrimitives.ReadUInt32LittleEndian(data.AsSpan(8))), Is.EqualTo((0x20006u, 4096UL, 2u)));
        Assert.That(BinaryPrimitives.ReadUInt64LittleEndian(data.AsSpan(16)), Is.EqualTo(0xeeeeeeeeeeeeeeee), "the fake replaces the pointer with this pattern");
        Assert.That(pointee, Is.EqualTo(U64(0, 0x10000, 0x100000, 0x4000)));
        _device.Features[7] = [];
        Assert.That(Io.StopDmaLog(), Is.EqualTo(Errno.None));
        Assert.That(_device.FeatureCalls[^1].Flags, Is.EqualTo(0x20007u));
    }

    [Test]
    public void A_report_adds_its_bits()
    {
        _device.Features[8] = [0b101];
        ulong[] bitmap = [0b10, 1];
        Assert.That(Io.ReportDmaLog(new GuestRange(new GuestAddress(0x100000), 128 * 4096), 4096, bitmap), Is.EqualTo(Errno.None));
        Assert.That(bitmap, Is.EqualTo(new ulong[] { 0b111, 1 }));
        (uint flags, byte[] data, _) = _device.FeatureCalls[^1];
        Assert.That((flags, data[..24]), Is.EqualTo((0x10008u, U64(0x100000, 128 * 4096, 4096))));
    }

    [TestCase(129 * 4096ul, 4096ul)]
    [TestCase(4096ul, 0ul)]
    public void A_report_that_would_write_past_its_bitmap_never_reaches_the_kernel(ulong length, ulong page)
    {
        Assert.That(Io.ReportDmaLog(new GuestRange(new GuestAddress(0), length), page, new ulong[2]), Is.EqualTo(Errno.EINVAL));
        Assert.That(_device.FeatureCalls.Count(static c => (c.Flags & 0xffff) == 8), Is.Zero);
    }

    [Test]
    public void A_failed_report_keeps_its_errno() =>
        Assert.That(Io.ReportDmaLog(new GuestRange(new GuestAddress(0), 4096), 4096, new ulong[1]), Is.EqualTo(Errno.ENOTTY));

    [Test]
    public void Reset_answers_what_the_device_says()
    {
        Assert.That(Io.Reset(), Is.EqualTo(Errno.None));
        _device.ResetWorks = false;
        Assert.That(Io.Reset(), Is.EqualTo(Errno.EINVAL));
    }

    private IVfioMigrationData Session()
    {
        _device.MigState = (uint)VfioDeviceState.Running;
        KernelVfioDeviceIo io = Io;
        _device.GivesDataFd = true;
        io.SetMigrationState(VfioDeviceState.PreCopy, out IVfioMigrationData? data);
        return data!;
    }

    private static byte[] U32(params uint[] values) => [.. values.SelectMany(BitConverter.GetBytes)];

    private static byte[] U64(params ulong[] values) => [.. values.SelectMany(BitConverter.GetBytes)];

    private static byte[] Link(ushort id, int next) => [.. BitConverter.GetBytes(id), 1, 0, .. BitConverter.GetBytes(next)];

    /// <summary>A chain of capabilities that begins at offset 32.</summary>
    private static byte[] Caps(params (ushort Id, byte[] Body)[] caps)
    {
        List<byte> bytes = [];
        foreach ((ushort id, byte[] body) in caps)
        {
            int next = 32 + bytes.Count + 8 + body.Length;
            bytes.AddRange([.. Link(id, id == caps[^1].Id ? 0 : next), .. body]);
        }
        return [.. bytes];
    }
}
