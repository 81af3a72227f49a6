namespace Vmm.Tools.Bench.Migrate;

/// <summary>A file in /dev/shm that is one end's RAM.</summary>
internal sealed class RamFile : IDisposable
{
    private const string Folder = "/dev/shm", Prefix = "vmm-bench-";
    private const int PageBytes = 4096, BatchPages = 256, RunPages = 256;

    internal RamFile(string end, int sizeMiB)
    {
        RemoveLeftovers();
        Path = System.IO.Path.Combine(Folder, $"{Prefix}{Environment.ProcessId}-{end}");
        SizeBytes = (long)sizeMiB << 20;
    }

    internal string Path { get; }

    internal long SizeBytes { get; }

    /// <summary>Writes zeros. The file keeps its memory: what the kernel hands out anew costs more than the migration.</summary>
    internal void Clear()
    {
        byte[] zeros = new byte[BatchPages * PageBytes];
        using FileStream stream = File.OpenWrite(Path);
        for (long at = 0; at < SizeBytes; at += zeros.Length) stream.Write(zeros);
    }

    /// <summary>Writes the content. Every page differs from all others.</summary>
    internal void Fill(RamContent content)
    {
        if (content == RamContent.Zero)
        {
            Clear();
            return;
        }
        byte[] batch = new byte[BatchPages * PageBytes];
        long pages = SizeBytes / PageBytes;
        var random = new Random();
        using FileStream stream = File.OpenWrite(Path);
        for (long first = 0; first < pages; first += BatchPages)
        {
            random.NextBytes(batch);
            for (int i = 0; i < BatchPages; i++) Shape(content, batch.AsSpan(i * PageBytes, PageBytes), first + i, pages);
            stream.Write(batch);
        }
    }

    /// <summary>Compares the RAM of both ends.</summary>
    /// <returns>The first page that differs, or null.</returns>
    internal static long? FirstDifference(RamFile left, RamFile right)
    {
        byte[] a = new byte[4 << 20], b = new byte[4 << 20];
        using FileStream one = File.OpenRead(left.Path), other = File.OpenRead(right.Path);
        for (long at = 0; at < left.SizeBytes; at += a.Length)
        {
            int length = (int)Math.Min(a.Length, left.SizeBytes - at);
            one.ReadExactly(a, 0, length);
            other.ReadExactly(b, 0, length);
            int same = a.AsSpan(0, length).CommonPrefixLength(b.AsSpan(0, length));
            if (same < length) return (at + same) / PageBytes;
        }
        return null;
    }

    public void Dispose() => File.Delete(Path);

    /// <summary>Removes the files of benches that were killed.</summary>
    private static void RemoveLeftovers()
    {
        foreach (string file in Directory.EnumerateFiles(Folder, Prefix + "*-*"))
            if (!Directory.Exists($"/proc/{System.IO.Path.GetFileName(file)[Prefix.Length..].Split('-')[0]}")) File.Delete(file);
    }

    private static void Shape(RamContent content, Span<byte> page, long index, long pages)
    {
        switch (content)
        {
            case RamContent.HalfZero when index < pages / 2 ? index / RunPages % 2 == 0 : index % 2 == 0:
                page.Clear();
                break;
            case RamContent.HalfCompressible:
                for (int at = PageBytes / 2; at < PageBytes; at += 16) "the guest's text "u8[..16].CopyTo(page[at..]);
                break;
        }
    }
}
