using Vmm.Core.Memory;
using Vmm.Migration.Ram;

namespace Vmm.Tests.Property;

/// <summary>What the encoder makes, the decoder turns into the page, and it is never longer than one run for each changed piece (stream 3.4).</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class XbzrleProperties
{
    private const int PageSize = RamBlock.PageSize;

    [Test]
    public void RandomChangesRoundTrip([Range(1, 60)] int seed)
    {
        var random = new Random(seed);
        byte[] old = new byte[PageSize];
        if (seed % 3 != 0) random.NextBytes(old);
        byte[] now = [.. old];
        for (int changes = random.Next(1, 200); changes > 0; changes--)
        {
            int at = random.Next(PageSize), count = Math.Min(PageSize - at, 1 + (random.Next(2) == 0 ? random.Next(4) : random.Next(400)));
            random.NextBytes(now.AsSpan(at, count));
        }
        AssertRoundTrip(old, now);
    }

    /// <summary>Changes at each distance from each other, over the borders of words and of lengths with one byte.</summary>
    [Test]
    public void EveryPairOfRunsRoundTrips([Values(1, 2, 63, 64, 127, 128, 129)] int count, [Values(1, 2, 3, 63, 64, 65, 127, 128, 129, 3000)] int gap)
    {
        for (int at = 0; at < 130; at++)
        {
            byte[] old = new byte[PageSize], now = new byte[PageSize];
            now.AsSpan(at, count).Fill(1);
            now.AsSpan(at + count + gap, count).Fill(2);
            AssertRoundTrip(old, now);
        }
    }

    [Test]
    public void EverySingleByteRoundTrips()
    {
        for (int at = 0; at < PageSize; at++)
        {
            byte[] old = new byte[PageSize], now = new byte[PageSize];
            now[at] = 7;
            Assert.That(AssertRoundTrip(old, now), Is.EqualTo(at < 0x80 ? 3 : 4));
        }
    }

    [Test]
    public void TheBytesAreThoseOfTheFormat()
    {
        byte[] old = new byte[PageSize], now = new byte[PageSize], delta = new byte[PageSize];
        now[4095] = 0x0a;
        int length = Xbzrle.Encode(old, now, delta);
        Assert.That(delta[..length], Is.EqualTo(new byte[] { 0xff, 0x1f, 0x01, 0x0a }));
        now[0] = 0x5b;
        length = Xbzrle.Encode(old, now, delta);
        Assert.That(delta[..length], Is.EqualTo(new byte[] { 0x00, 0x01, 0x5b, 0xfe, 0x1f, 0x01, 0x0a }));
    }

    [Test]
    public void PagesThatChangeEverywhereHaveNoRoom()
    {
        byte[] old = new byte[PageSize], all = new byte[PageSize], alternating = new byte[PageSize], thirds = new byte[PageSize], half = new byte[PageSize];
        all.AsSpan().Fill(1);
        for (int i = 0; i < PageSize; i += 2) alternating[i] = 1;
        for (int i = 0; i < PageSize; i += 3) thirds[i] = 1;
        for (int i = 0; i < PageSize / 2; i += 2) half[i] = 1;
        byte[] delta = new byte[PageSize];
        Assert.That(Xbzrle.Encode(old, all, delta), Is.EqualTo(-1));
        Assert.That(Xbzrle.Encode(old, thirds, delta), Is.EqualTo(1366 * 3 > PageSize ? -1 : 1366 * 3));
        // The bytes between belong to the run, which then fits: 2047 or 4095 bytes and two lengths.
        Assert.That(AssertRoundTrip(old, half), Is.EqualTo(3 + 2047));
        Assert.That(Xbzrle.Encode(old, alternating, delta), Is.EqualTo(-1));
        alternating[0] = alternating[2] = 0;
        Assert.That(AssertRoundTrip(old, alternating), Is.EqualTo(3 + 4091));
    }

    [Test]
    public void EqualPagesGiveNothing()
    {
        byte[] page = new byte[PageSize];
        new Random(5).NextBytes(page);
        Assert.That(Xbzrle.Encode(page, [.. page], new byte[PageSize]), Is.Zero);
    }

    /// <returns>The length of the delta.</returns>
    private static int AssertRoundTrip(byte[] old, byte[] now)
    {
        byte[] delta = new byte[PageSize];
        int length = Xbzrle.Encode(old, now, delta), separate = SeparateRuns(old, now);
        if (length < 0)
        {
            Assert.That(separate, Is.GreaterThan(PageSize));
            return length;
        }
        Assert.That(length, Is.LessThanOrEqualTo(separate));
        byte[] page = [.. old];
        Assert.That(Xbzrle.TryDecode(delta.AsSpan(0, length), page));
        Assert.That(page.AsSpan().SequenceEqual(now), "the decoded page differs");
        return length;
    }

    /// <summary>The length with one run for each piece of changed bytes.</summary>
    private static int SeparateRuns(byte[] old, byte[] now)
    {
        int total = 0;
        for (int at = 0; at < PageSize;)
        {
            int same = at;
            while (same < PageSize && old[same] == now[same]) same++;
            if (same == PageSize) break;
            int end = same;
            while (end < PageSize && old[end] != now[end]) end++;
            total += (same - at < 0x80 ? 1 : 2) + (end - same < 0x80 ? 1 : 2) + end - same;
            at = end;
        }
        return total;
    }
}
