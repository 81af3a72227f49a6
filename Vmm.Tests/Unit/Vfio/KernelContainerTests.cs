using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Devices.Vfio.Uapi;
using Vmm.Tests.Fakes;

namespace Vmm.Tests.Unit.Vfio;

/// <summary>DMA mappings follow guest RAM, and containers keep dirty logs (vfio-migration 1.8 to 1.10).</summary>
internal sealed class KernelContainerTests
{
    private const string Address = "0000:00:01.0";
    private const ulong MiB = 1 << 20;
    private FakeVfioHost _host = null!;
    private KernelVfioDeviceIo? _io;

    [SetUp]
    public void SetUp() => _host = new FakeVfioHost();

    [TearDown]
    public void TearDown()
    {
        _io?.Dispose();
        _io = null;
        _host.Dispose();
    }

    [Test]
    public void Memory_is_mapped_where_the_guest_sees_it_and_as_long_as_it_is_there([Values] bool iommufd)
    {
        RamBlock before = Ram("before", 0, MiB);
        Open(iommufd);
        RamBlock after = Ram("after", 4 * MiB, 2 * MiB);
        Assert.That(_host.Kernel.Mappings.Select(static m => (m.Key, m.Value.Size)), Is.EqualTo(new[] { (0UL, MiB), (4 * MiB, 2 * MiB) }));
        Assert.That(_host.Kernel.Mappings[0].From, Is.EqualTo(iommufd ? 0 : (ulong)before.HostAddress));
        Assert.That(_host.Kernel.Mappings[4 * MiB].Flags, Is.EqualTo(iommufd ? 7 : 3));
        _host.Memory.RemoveBlock(after);
        Assert.That(_host.Kernel.Mappings.Keys, Is.EqualTo(new[] { 0UL }));
        _io!.Dispose();
        Assert.That(_host.Kernel.Mappings, Is.Empty);
    }

    [Test]
    public void Memory_goes_around_what_the_iommu_keeps([Values] bool iommufd)
    {
        (ulong, ulong)[] ranges = [(0, (2 * MiB) - 1), (3 * MiB, ulong.MaxValue)];
        _host.Kernel.IovaRanges = ranges;
        _host.Kernel.Type1Caps = Type1Caps(ranges, 0x1000, 0x10000000);
        RamBlock ram = Ram("ram", 0, 4 * MiB);
        Open(iommufd);
        ulong from = iommufd ? 0 : (ulong)ram.HostAddress;
        Assert.That(_host.Kernel.Mappings.Select(static m => (m.Key, m.Value.Size, m.Value.From)), Is.EqualTo(new[] { (0UL, 2 * MiB, from), (3 * MiB, MiB, from + (3 * MiB)) }));
    }

    [Test]
    public void A_map_that_fails_half_way_leaves_nothing_and_keeps_the_memory_away()
    {
        _host.Kernel.Type1Caps = Type1Caps([(0, MiB - 1), (2 * MiB, ulong.MaxValue)], 0x1000, 0x10000000);
        Open(iommufd: false);
        _host.Kernel.FailOnSecond["container: MAP_DMA"] = Errno.ENOMEM;
        Assert.That(() => Ram("ram", 0, 4 * MiB), Throws.TypeOf<VfioException>().With.Property("Errno").EqualTo(Errno.ENOMEM));
        Assert.That(_host.Kernel.Mappings, Is.Empty);
        Assert.That(_host.Memory.Blocks, Is.Empty);
    }

    [Test]
    public void An_unmap_that_fails_is_an_error_since_devices_may_still_write()
    {
        RamBlock ram = Ram("ram", 0, MiB);
        Open(iommufd: false);
        _host.Kernel.Failures["UNMAP_DMA"] = Errno.EINVAL;
        Assert.That(() => _host.Memory.RemoveBlock(ram), Throws.TypeOf<VfioException>().With.Message.Contains("cannot unmap"));
        _host.Kernel.Failures.Clear();
    }

    [Test]
    public void An_unmap_of_what_iommufd_no_longer_has_is_no_error()
    {
        RamBlock ram = Ram("ram", 0, MiB);
        Open(iommufd: true);
        _host.Kernel.Mappings.Clear();
        Assert.That(() => _host.Memory.RemoveBlock(ram), Throws.Nothing);
    }

    [Test]
    public void A_kernel_without_file_mappings_gets_addresses()
    {
        _host.Kernel.Failures["IOAS_MAP_FILE"] = Errno.ENOTTY;
        RamBlock one = Ram("one", 0, MiB);
        Open(iommufd: true);
        Ram("two", 2 * MiB, MiB);
        Assert.That(_host.Kernel.Mappings[0].From, Is.EqualTo((ulong)one.HostAddress));
        Assert.That(_host.Kernel.Calls.Count(static c => c == "iommufd: IOAS_MAP_FILE"), Is.EqualTo(1), "the container tries a file mapping only once");
    }

    [Test]
    public void Private_memory_is_mapped_by_address()
    {
        _host.Memory.AddBlock(new RamBlockOptions { Name = "ram", SizeBytes = MiB, IsShared = false });
        Open(iommufd: true);
        Assert.That(_host.Kernel.Calls, Has.Member("iommufd: IOAS_MAP").And.None.EqualTo("iommufd: IOAS_MAP_FILE"));
    }

    [TestCase(0x1000UL, 0x10000000UL, true)]
    [TestCase(0x201000UL, 0x10000000UL, true)]
    [TestCase(0x200000UL, 0x10000000UL, false)]
    public void Type1_logs_when_it_says_so_for_pages_of_4096(ulong pageSizes, ulong maxBytes, bool expected)
    {
        _host.Kernel.Type1Caps = Type1Caps([(0, ulong.MaxValue)], pageSizes, maxBytes);
        Open(iommufd: false);
        Assert.That((_io!.Container.CanLogDirty, _io.Container.MaxDirtyBitmapBytes), Is.EqualTo((expected, expected ? maxBytes : 0)));
    }

    [Test]
    public void Type1_without_capabilities_does_not_log()
    {
        Open(iommufd: false);
        Assert.That(_io!.Container.CanLogDirty, Is.False);
    }

    [Test]
    public void Type1_starts_and_stops_its_log()
    {
        Open(iommufd: false);
        Assert.That((_io!.Container.StartDirtyLog(), _io.Container.StopDirtyLog()), Is.EqualTo((Errno.None, Errno.None)));
        Assert.That(_host.Kernel.Calls[^2..], Is.EqualTo(new[] { "container: DIRTY_PAGES 1", "container: DIRTY_PAGES 2" }));
        _host.Kernel.Failures["DIRTY_PAGES"] = Errno.ENOMEM;
        Assert.That(_io.Container.StartDirtyLog(), Is.EqualTo(Errno.ENOMEM));
    }

    [Test]
    public void Mappings_are_no_longer_than_one_bitmap_reaches_and_one_query_asks_for_each()
    {
        // A bitmap of 8 bytes covers 64 pages.
        _host.Kernel.Type1Caps = Type1Caps([(0, ulong.MaxValue)], 0x1000, 8);
        RamBlock ram = Ram("ram", 0, 100 * 4096);
        Open(iommufd: false);
        Assert.That(_host.Kernel.Mappings.Select(static m => (m.Key, m.Value.Size)), Is.EqualTo(new[] { (0UL, 64UL * 4096), (64UL * 4096, 36UL * 4096) }));
        _host.Kernel.DirtyPages.UnionWith([0, 63, 64, 99]);
        ulong[] bitmap = [1 << 5, 0];
        Assert.That(_io!.Container.GetDirtyBitmap(ram.Range, bitmap), Is.EqualTo(Errno.None));
        Assert.That(bitmap, Is.EqualTo(new[] { 1 | (1UL << 5) | (1UL << 63), 1 | (1UL << 35) }), "the query adds its bits to those already set");
        Assert.That(_host.Kernel.Queries, Is.EqualTo(new[] { (0UL, 64UL * 4096, 8), (64UL * 4096, 36UL * 4096, 8) }));
        Assert.That(_host.Kernel.DirtyPages, Is.Empty);
    }

    [Test]
    public void Bits_land_where_they_belong_behind_a_hole([Values] bool iommufd)
    {
        // After the hole of three pages the second mapping begins at page 7, so its bits are shifted by seven.
        (ulong, ulong)[] ranges = [(0, (4 * 4096) - 1), (7 * 4096, ulong.MaxValue)];
        _host.Kernel.IovaRanges = ranges;
        _host.Kernel.Type1Caps = Type1Caps(ranges, 0x1000, 0x10000000);
        _host.Kernel.HwCapabilities = 1;
        RamBlock ram = Ram("ram", 0, 200 * 4096);
        Open(iommufd);
        ulong[] pages = [0, 3, 7, 63, 64, 70, 71, 127, 128, 135, 199];
        _host.Kernel.DirtyPages.UnionWith([.. pages, 5]);
        ulong[] bitmap = new ulong[4];
        Assert.That(_io!.Container.GetDirtyBitmap(ram.Range, bitmap), Is.EqualTo(Errno.None));
        Assert.That(Enumerable.Range(0, 256).Where(p => (bitmap[p / 64] >> (p % 64) & 1) != 0).Select(static p => (ulong)p), Is.EqualTo(pages));
    }

    [Test]
    public void A_type1_query_that_cuts_a_mapping_is_refused_before_it_loses_bits()
    {
        _host.Kernel.Type1Caps = Type1Caps([(0, ulong.MaxValue)], 0x1000, 0x10000000);
        Ram("ram", 0, MiB);
        Open(iommufd: false);
        _host.Kernel.DirtyPages.Add(1);
        Assert.That(_io!.Container.GetDirtyBitmap(new GuestRange(new GuestAddress(0), MiB / 2), new ulong[4]), Is.EqualTo(Errno.EINVAL));
        Assert.That(_host.Kernel.DirtyPages, Has.Count.EqualTo(1));
    }

    [TestCase(MiB, 3)]
    [TestCase(MiB + 1, 5)]
    public void A_bitmap_that_is_too_short_or_a_ragged_range_is_refused(ulong length, int words)
    {
        Ram("ram", 0, 2 * MiB);
        Open(iommufd: true);
        Assert.That(_io!.Container.GetDirtyBitmap(new GuestRange(new GuestAddress(0), length), new ulong[words]), Is.EqualTo(Errno.EINVAL));
    }

    [Test]
    public void A_failing_query_is_answered_with_its_errno([Values] bool iommufd)
    {
        _host.Kernel.HwCapabilities = 1;
        RamBlock ram = Ram("ram", 0, MiB);
        Open(iommufd);
        _host.Kernel.Failures[iommufd ? "HWPT_GET_DIRTY_BITMAP" : "DIRTY_PAGES"] = Errno.EIO;
        Assert.That(_io!.Container.GetDirtyBitmap(ram.Range, new ulong[4]), Is.EqualTo(Errno.EIO));
    }

    [Test]
    public void Iommufd_logs_over_all_page_tables_and_takes_back_a_start_that_failed()
    {
        _host.Kernel.HwCapabilities = 1;
        _host.AddPci("0000:00:02.0", group: "8", cdev: "vfio1");
        Open(iommufd: true);
        _host.Kernel.Failures["device: ATTACH_IOMMUFD_PT 101"] = Errno.EINVAL;
        using KernelVfioDeviceIo other = _host.Open("host=0000:00:02.0,iommufd=on");
        Assert.That(_io!.Container.StartDirtyLog(), Is.EqualTo(Errno.None));
        Assert.That(_host.Kernel.Calls[^2..], Is.EqualTo(new[] { "iommufd: HWPT_SET_DIRTY_TRACKING 101 1", "iommufd: HWPT_SET_DIRTY_TRACKING 102 1" }));
        Assert.That(_io.Container.StopDirtyLog(), Is.EqualTo(Errno.None));
        _host.Kernel.Failures["iommufd: HWPT_SET_DIRTY_TRACKING 102 1"] = Errno.EOPNOTSUPP;
        Assert.That(_io.Container.StartDirtyLog(), Is.EqualTo(Errno.EOPNOTSUPP));
        Assert.That(_host.Kernel.Calls, Has.Exactly(2).EqualTo("iommufd: HWPT_SET_DIRTY_TRACKING 101 0"));
    }

    [Test]
    public void Iommufd_without_tracking_refuses_to_log()
    {
        Open(iommufd: true);
        Assert.That((_io!.Container.StartDirtyLog(), _io.Container.MaxDirtyBitmapBytes), Is.EqualTo((Errno.EOPNOTSUPP, 0UL)));
    }

    [Test]
    public void Many_address_ranges_are_asked_for_twice()
    {
        _host.Kernel.IovaRanges = [.. Enumerable.Range(0, 40).Select(static i => ((ulong)i * 2 * MiB, (((ulong)i * 2) + 1) * MiB - 1))];
        Ram("ram", 0, 80 * MiB);
        Open(iommufd: true);
        Assert.That(_host.Kernel.Mappings, Has.Count.EqualTo(40));
    }

    [Test]
    public void The_type1_info_with_a_broken_chain_is_refused()
    {
        _host.Kernel.Type1Caps = [99, 0, 1, 0, 24, 0, 0, 0];
        _host.AddPci(Address);
        Assert.That(() => _host.Open($"host={Address}"), Throws.TypeOf<VfioException>().With.Message.Contains("capability"));
        Assert.That(_host.Kernel.OpenCount, Is.Zero);
    }

    [Test]
    public void Bits_or_into_any_place([Random(0, 200, 5)] int first, [Random(1, 200, 5)] int pages)
    {
        var random = new Random((first * 1000) + pages);
        ulong[] source = new ulong[(pages + 63) / 64], target = new ulong[(first + pages + 63) / 64];
        for (int i = 0; i < source.Length; i++) source[i] = (ulong)random.NextInt64(long.MinValue, long.MaxValue);
        KernelContainer.OrInto(target, (ulong)first, source, (ulong)pages);
        for (int p = 0; p < target.Length * 64; p++)
        {
            bool expected = p >= first && p < first + pages && (source[(p - first) / 64] >> ((p - first) % 64) & 1) != 0;
            Assert.That((target[p / 64] >> (p % 64) & 1) != 0, Is.EqualTo(expected), $"page {p}");
        }
    }

    private void Open(bool iommufd)
    {
        _host.AddPci(Address, cdev: iommufd ? "vfio0" : null);
        _io = _host.Open($"host={Address},iommufd={(iommufd ? "on" : "off")}");
    }

    private RamBlock Ram(string name, ulong address, ulong sizeBytes) =>
        _host.Memory.AddBlock(new RamBlockOptions { Name = name, SizeBytes = sizeBytes }, new GuestAddress(address));

    /// <summary>The capabilities IOVA_RANGE, MIGRATION and DMA_AVAIL; the first lies at offset 24.</summary>
    private static byte[] Type1Caps((ulong First, ulong Last)[] ranges, ulong pageSizes, ulong maxBytes)
    {
        int second = 16 + (ranges.Length * 16), third = second + 32;
        byte[] caps = new byte[third + 12];
        Header(caps, VfioUapi.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 24 + second);
        BinaryPrimitives.WriteInt32LittleEndian(caps.AsSpan(8), ranges.Length);
        for (int i = 0; i < ranges.Length; i++)
        {
            BinaryPrimitives.WriteUInt64LittleEndian(caps.AsSpan(16 + (16 * i)), ranges[i].First);
            BinaryPrimitives.WriteUInt64LittleEndian(caps.AsSpan(24 + (16 * i)), ranges[i].Last);
        }
        Header(caps.AsSpan(second), VfioUapi.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, 24 + third);
        BinaryPrimitives.WriteUInt64LittleEndian(caps.AsSpan(second + 16), pageSizes);
        BinaryPrimitives.WriteUInt64LittleEndian(caps.AsSpan(second + 24), maxBytes);
        Header(caps.AsSpan(third), VfioUapi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 0);
        BinaryPrimitives.WriteInt32LittleEndian(caps.AsSpan(third + 8), 65535);
        return caps;
    }

    private static void Header(Span<byte> at, ushort id, int next)
    {
        BinaryPrimitives.WriteUInt16LittleEndian(at, id);
        BinaryPrimitives.WriteUInt16LittleEndian(at[2..], 1);
        BinaryPrimitives.WriteInt32LittleEndian(at[4..], next);
    }
}
