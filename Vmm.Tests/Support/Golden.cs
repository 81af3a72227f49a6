using System.IO.Compression;

namespace Vmm.Tests.Support;

/// <summary>Captures of real QEMU streams (Golden/qemu/README.md says where each comes from).</summary>
internal static class Golden
{
    private static string Folder => Path.Combine(AppContext.BaseDirectory, "Golden", "qemu");

    /// <summary>Names of all captures, without <c>.gz</c>.</summary>
    internal static IEnumerable<string> Names =>
        Directory.GetFiles(Folder, "*.bin*").Select(static p => Path.GetFileName(p).Replace(".gz", "", StringComparison.Ordinal)).Order();

    /// <summary>A capture's bytes; compressed ones are unpacked.</summary>
    internal static byte[] Read(string name)
    {
        string plain = Path.Combine(Folder, name);
        if (File.Exists(plain)) return File.ReadAllBytes(plain);
        using var gzip = new GZipStream(File.OpenRead(plain + ".gz"), CompressionMode.Decompress);
        using var bytes = new MemoryStream();
        gzip.CopyTo(bytes);
        return bytes.ToArray();
    }

    /// <summary>RAM_A of the captures: 1 MiB, ten pages that are not zero.</summary>
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
