using System.IO.Compression;

namespace Vmm.Tests.Support;

/// <summary>Captures of real QEMU streams; Golden/qemu/README.md gives the origin of each.</summary>
internal static class Golden
{
    private static string Folder => Path.Combine(AppContext.BaseDirectory, "Golden", "qemu");

    /// <summary>Names of all captures, without <c>.gz</c>.</summary>
    internal static IEnumerable<string> Names =>
        Directory.GetFiles(Folder, "*.bin*").Select(static p => Path.GetFileName(p).Replace(".gz", "", StringComparison.Ordinal)).Order();

    /// <summary>Reads a capture, and unpacks it if it is compressed.</summary>
    internal static byte[] Read(string name)
    {
        string plain = Path.Combine(Folder, name);
        if (File.Exists(plain)) return File.ReadAllBytes(plain);
        using var gzip = new GZipStream(File.OpenRead(plain + ".gz"), CompressionMode.Decompress);
        using var bytes = new MemoryStream();
        gzip.CopyTo(bytes);
        return bytes.ToArray();
    }

    /// <summary>The image RAM_A of the captures: 1 MiB with ten non-zero pages.</summary>
    internal static byte[] RamA()
    {
        byte[] ram = new byte[1 << 20];
        for (int p = 1; p < 256; p += 32)
            for (int o = 0; o < 4096; o++) ram[(p * 4096) + o] = (byte)((31 * p) + (17 * (o >> 4)) + o);
        ram[(8 * 4096) + 4095] = 0x5a;
        ram[9 * 4096] = 0xa5;
        return ram;
    }
}
