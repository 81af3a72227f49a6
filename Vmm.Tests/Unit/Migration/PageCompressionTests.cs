using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Migration.Multifd;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration;

/// <summary>The codecs of multifd's channels (stream 4.5): one endless stream for each channel, flushed with each packet.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class PageCompressionTests
{
    private const int Packets = 50;

    [Test]
    public void WhatOneSideCompressesTheOtherReads([Values("Zlib", "Zstd")] string method, [Values(0, 1, 9)] int level, [Range(1, 3)] int seed)
    {
        var settings = new MultifdSettings(1, Enum.Parse<MultifdCompression>(method), level);
        using TestVm source = TestVm.WithRam(2 << 20), destination = TestVm.WithRam(2 << 20);
        using PageCompressor compressor = PageCompressor.Of(settings)!;
        using PageDecompressor decompressor = PageDecompressor.Of(settings)!;
        var random = new Random(seed);
        for (int i = 0; i < Packets; i++)
        {
            long[] pages = [.. Enumerable.Range(0, 512).Select(static p => (long)p).OrderBy(_ => random.Next()).Take(random.Next(1, MultifdPacket.PagesAllocated + 1))];
            foreach (long page in pages) Fill(source.Ram.Slice((ulong)page * RamBlock.PageSize, RamBlock.PageSize), random);
            byte[] payload = compressor.Compress(source.Ram, pages).ToArray();
            decompressor.Begin(payload, payload.Length);
            foreach (long page in pages) Assert.That(decompressor.TryRead(destination.Ram.Slice((ulong)page * RamBlock.PageSize, RamBlock.PageSize)), $"packet {i}");
            Assert.That(decompressor.End(), Is.Zero, $"packet {i}");
        }
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
    }

    [Test]
    public void DamageIsRefusedOrGivesWrongPagesAndNothingElse([Values("Zlib", "Zstd")] string method, [Range(1, 4)] int seed)
    {
        var settings = new MultifdSettings(1, Enum.Parse<MultifdCompression>(method));
        using TestVm source = TestVm.WithRam(1 << 20).FilledRandom(seed, halfZero: true), destination = TestVm.WithRam(1 << 20);
        using PageCompressor compressor = PageCompressor.Of(settings)!;
        byte[] good = compressor.Compress(source.Ram, [0, 1, 2, 3]).ToArray();
        var random = new Random(seed);
        int refused = 0;
        for (int round = 0; round < 200; round++)
        {
            byte[] bytes = [.. good];
            for (int i = random.Next(1, 5); i > 0; i--) bytes[random.Next(bytes.Length)] ^= (byte)(1 << random.Next(8));
            using PageDecompressor decompressor = PageDecompressor.Of(settings)!;
            decompressor.Begin(bytes, random.Next(4) == 0 ? random.Next(bytes.Length) : bytes.Length);
            try
            {
                if (!decompressor.TryRead(destination.Ram.Slice(0, 4 * RamBlock.PageSize)) || decompressor.End() > 0) refused++;
            }
            catch (StreamFormatException)
            {
                refused++;
            }
        }
        Assert.That(refused, Is.GreaterThan(0));
    }

    [Test]
    public void AFrameWithALargerWindowIsRefused()
    {
        using PageDecompressor decompressor = PageDecompressor.Of(new MultifdSettings(1, MultifdCompression.Zstd))!;
        // Magic, no single segment, window descriptor: exponent 17 is a window of 2^27 bytes.
        byte[] frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 17 << 3, 0x01, 0x00, 0x00];
        decompressor.Begin(frame, frame.Length);
        Assert.That(Assert.Catch<StreamFormatException>(() => decompressor.TryRead(new byte[16]))!.Message, Does.Contain("zstd"));
    }

    private static void Fill(Span<byte> page, Random random)
    {
        if (random.Next(3) == 0) random.NextBytes(page);
        else page.Fill((byte)random.Next(256));
    }
}
