using System.Text.Json.Nodes;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Demo;

/// <summary>Compares the guest RAM of two VMs through pmemsave, in pieces, so that the disk needs room for two pieces only.</summary>
internal static class RamComparison
{
    private const int PieceBytes = 64 << 20;

    /// <summary>Returns the first guest address at which the two VMs differ, or null.</summary>
    public static async Task<long?> FirstDifference(IMonitor a, IMonitor b, long sizeBytes, string folder, CancellationToken cancel)
    {
        string fileA = Path.Combine(folder, "a.ram"), fileB = Path.Combine(folder, "b.ram");
        for (long at = 0; at < sizeBytes; at += PieceBytes)
        {
            long length = Math.Min(PieceBytes, sizeBytes - at);
            await Save(a, at, length, fileA, cancel);
            await Save(b, at, length, fileB, cancel);
            byte[] bytesA = await File.ReadAllBytesAsync(fileA, cancel), bytesB = await File.ReadAllBytesAsync(fileB, cancel);
            int same = bytesA.AsSpan().CommonPrefixLength(bytesB);
            if (same < length) return at + same;
        }
        return null;
    }

    private static Task<JsonNode?> Save(IMonitor vm, long at, long length, string file, CancellationToken cancel) =>
        vm.Execute("pmemsave", new JsonObject { ["val"] = at, ["size"] = length, ["filename"] = file }, cancel);
}
