using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.RawVfioUserClient;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>A client may map as often as VERSION says, and the server lives. Not parallel, because mappings are counted over the whole process.</summary>
[TestFixture]
[NonParallelizable]
internal sealed class ManyMapsTests
{
    private const ulong Page = 4096;

    [Test]
    public void AsManyMapsAsTheServerOffersNeedFewMappingsAndDescriptors([Values] bool onlySealed, [Values] bool isSealed)
    {
        using var fake = new FakeVfioUserBackend();
        using var served = new ServedDevice(fake, new VfioUserServerOptions { MapOnlySealed = onlySealed });
        using OwnedFd file = isSealed ? Posix.MemFd("many", 16 * (long)Page) : Posix.MemFd("many");
        if (!isSealed) Posix.Truncate(file, 16 * (long)Page);
        int before = LeakCheck.Descriptors().Count, mapped = DmaRegion.MappedCount;
        using (RawVfioUserClient client = served.Attach())
        {
            for (int i = 0; i < VfioUserLimits.DmaMaps; i++) client.Map((ulong)i * 2 * Page, Page, file, (ulong)(i % 16) * Page);
            client.Fails(Errno.EINVAL, VfioUserCommand.DmaMap, MapRequest(1UL << 40, Page), file);
            Assert.That(fake.Host.Dma.RegionCount, Is.EqualTo(VfioUserLimits.DmaMaps));
            Assert.That(DmaRegion.MappedCount, Is.LessThanOrEqualTo(onlySealed && !isSealed ? mapped : VfioUserLimits.MappedRegions));
            Assert.That(fake.Host.Dma.FileCount, Is.EqualTo(1));
            Assert.That(LeakCheck.Descriptors().Count - before, Is.LessThan(20));
            // The first and the last range reach the same page of the file, in whichever way.
            byte[] data = [1, 2, 3, 4], back = new byte[4];
            ulong last = (VfioUserLimits.DmaMaps - 15) * 2 * Page;
            Assert.That((fake.Host.Dma.Write(0, data), fake.Host.Dma.Read(last, back)), Is.EqualTo((Errno.None, Errno.None)));
            Assert.That(back, Is.EqualTo(data));
            client.StartLog();
            Assert.That(fake.Host.Dma.Write(last, data), Is.EqualTo(Errno.None));
            Assert.That(client.Report(last, Page), Is.EqualTo((int[])[0]));
            client.Ok(VfioUserCommand.DmaUnmap, UnmapRequest(2 * Page, Page));
        }
        served.Ended();
        Assert.That((fake.Host.Dma.RegionCount, fake.Host.Dma.FileCount, DmaRegion.MappedCount), Is.EqualTo((0, 0, mapped)));
        served.Attach().Dispose();
    }

    [Test]
    public void TheNumberOfFilesIsLimited()
    {
        using var fake = new FakeVfioUserBackend();
        using var served = new ServedDevice(fake, new VfioUserServerOptions { MapClientMemory = false });
        using RawVfioUserClient client = served.Attach();
        for (int i = 0; i <= VfioUserLimits.DmaFiles; i++)
        {
            using OwnedFd file = Posix.MemFd($"file{i}", (long)Page);
            if (i < VfioUserLimits.DmaFiles) client.Map((ulong)i * Page, Page, file);
            else client.Fails(Errno.EMFILE, VfioUserCommand.DmaMap, MapRequest((ulong)i * Page, Page), file);
        }
        client.Ok(VfioUserCommand.DmaUnmap, UnmapRequest(0, Page));
        using OwnedFd again = Posix.MemFd("again", (long)Page);
        client.Map(0, Page, again);
    }
}
