using System.Buffers.Binary;
using Vmm.Migration.Viewer;
using Vmm.Tests.Support;

namespace Vmm.Tests.Fuzz;

/// <summary>The stream viewer on hostile files: it never throws, always ends, and allocates memory in proportion to the file.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class StreamViewerFuzz
{
    private static readonly string[] s_seeds =
    [
        "none-111-noram.bin", "none-111-uuid.bin", "none-111-ignore-shared.bin", "none-111-mapped-ram-ignore-shared.bin", "none-72-noram.bin", "none-111-bgsnapshot.bin",
        "none-111-plain.bin", "none-111-postcopy.main.fwd.bin", "none-111-xbzrle.bin", "none-111-noconfig-novmdesc.bin", "q35-111-devices.bin",
        "none-111-mapped-ram.bin",
    ];

    /// <summary>Views one input.</summary>
    public static void Fuzz(ReadOnlySpan<byte> input)
    {
        byte[] bytes = input.ToArray();
        long before = GC.GetAllocatedBytesForCurrentThread();
        StreamDocument stream = StreamViewer.Read(new MemoryFile(bytes), new StreamViewOptions { ListPages = true });
        long held = GC.GetAllocatedBytesForCurrentThread() - before;
        // Fixed buffers take up to 512 KiB; each byte of the file makes at most one field, for which 700 bytes are enough.
        Assert.That(held, Is.LessThan((512 << 10) + (700L * bytes.Length)));
        Assert.That(stream.IsValid || stream.Violations.All(static v => v.Message.Length > 0));
        Assert.That(stream.IsComplete || !stream.IsValid);
        StreamText.Write(stream, TextWriter.Null);
        StreamJson.Write(stream, System.IO.Stream.Null);
    }

    [TestCaseSource(nameof(s_seeds))]
    public void DamagedStreamsNeverEscape(string name)
    {
        byte[] whole = Golden.Read(name);
        var random = new Random(name.Length + whole.Length);
        int rounds = whole.Length > 100_000 ? 60 : 400;
        for (int round = 0; round < rounds; round++)
        {
            byte[] bytes = whole.AsSpan().ToArray();
            for (int i = random.Next(1, 6); i > 0; i--) bytes = Damage(bytes, random);
            Fuzz(bytes);
        }
    }

    [Test]
    public void DamagedDescriptionsNeverEscape()
    {
        byte[] whole = Golden.Read("none-111-xbzrle.bin");
        int text = whole.AsSpan().LastIndexOf("{\"configuration\""u8);
        var random = new Random(11);
        for (int round = 0; round < 600; round++)
        {
            byte[] bytes = whole.AsSpan().ToArray();
            for (int i = random.Next(1, 8); i > 0; i--)
            {
                int at = random.Next(text, bytes.Length);
                bytes[at] = (byte)"0123456789{}[]\",:eE.-\\ufnstr"[random.Next(28)];
            }
            Fuzz(bytes);
        }
    }

    [Test]
    public void RandomBytesBehindAGoodHeaderNeverEscape([Range(1, 8)] int seed)
    {
        var random = new Random(seed);
        for (int i = 0; i < 200; i++)
        {
            byte[] tail = new byte[random.Next(2000)];
            random.NextBytes(tail);
            // Small numbers reach more code, because types and flags are small numbers.
            if (seed % 2 == 0) for (int k = 0; k < tail.Length; k++) tail[k] = (byte)(tail[k] % 12);
            Fuzz(new StreamBuilder().Header().Bytes(tail).ToArray());
        }
    }

    private static byte[] Damage(byte[] bytes, Random random)
    {
        int at = random.Next(bytes.Length);
        switch (random.Next(6))
        {
            case 0: bytes[at] ^= (byte)(1 << random.Next(8)); return bytes;
            case 1: bytes[at] = (byte)random.Next(256); return bytes;
            case 2:
                uint[] extremes = [0, 1, 0x7fffffff, 0x80000000, 0xffffffff, (uint)bytes.Length, 4096];
                if (at + 4 <= bytes.Length) BinaryPrimitives.WriteUInt32BigEndian(bytes.AsSpan(at), extremes[random.Next(extremes.Length)]);
                return bytes;
            case 3: return bytes[..Math.Max(1, at)];
            case 4:
                int length = random.Next(Math.Min(200, bytes.Length - at));
                return [.. bytes[..at], .. bytes[(at + length)..]];
            default:
                int from = random.Next(bytes.Length);
                int count = random.Next(Math.Min(200, bytes.Length - from));
                return [.. bytes[..at], .. bytes.AsSpan(from, count), .. bytes[at..]];
        }
    }
}
