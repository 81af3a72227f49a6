using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Tests.Support;
using Vmm.Tools.Devices;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>The sample device's timer never fires before its time, because the guest reads the seconds since then.</summary>
[TestFixture]
internal sealed class SampleDeviceTests
{
    /// <summary>Starts with a part of a millisecond and without one; the last time is farther away than one timer goes.</summary>
    [TestCase(10.0006, 12u)]
    [TestCase(10.9999, 11u)]
    [TestCase(10, 12u)]
    [TestCase(0.0001, 3_000_000u)]
    public void TheTimerDoesNotFireBeforeItsTime(double startSeconds, uint at)
    {
        var time = new ManualTimeProvider { UtcStart = DateTimeOffset.UnixEpoch + TimeSpan.FromSeconds(startSeconds) };
        using var side = new VfioUserSide(new ServedDevice(new SampleDevice(time)), sharedRam: true, 0x10000);
        byte[] written = new byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(written, at);
        side.Write(0, 0, written);
        TimeSpan left = TimeSpan.FromSeconds(at - startSeconds);
        time.Advance(left - TimeSpan.FromTicks(1));
        Assert.That(time.DueCount, Is.EqualTo(1), "the timer is still to fire");
        time.Advance(TimeSpan.FromMilliseconds(1));
        Assert.That(time.DueCount, Is.Zero);
        byte[] since = new byte[4];
        Assert.That(side.Io.RegionRead(0, 0, since), Is.EqualTo(Errno.None));
        Assert.That(BinaryPrimitives.ReadInt32LittleEndian(since), Is.Zero);
    }
}
