using System.Text.Json;
using System.Text.Json.Serialization;
using Vmm.Core.Errors;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;

namespace Vmm.Migration.Snapshot;

/// <summary>Reads and writes the <c>manifest.json</c> of a snapshot. Stateless.</summary>
internal static partial class ManifestFile
{
    internal const string Name = "manifest.json";

    internal static byte[] Write(SnapshotManifest manifest) => JsonSerializer.SerializeToUtf8Bytes(manifest, ManifestJson.Default.SnapshotManifest);

    /// <summary>Reads the manifest in a snapshot's directory.</summary>
    /// <exception cref="StreamFormatException">It is missing or damaged.</exception>
    /// <exception cref="StreamLimitException">It is longer than a manifest can be.</exception>
    internal static SnapshotManifest Read(string folder)
    {
        string what = $"snapshot '{Path.GetFileName(folder)}': {Name}";
        try
        {
            using FileChannel file = FileChannel.Open(Path.Combine(folder, Name), 0);
            if (file.LengthBytes > WireLimits.ManifestBytes)
                throw new StreamLimitException($"{what} has {file.LengthBytes} bytes, at most {WireLimits.ManifestBytes} are read (WireLimits.ManifestBytes)");
            byte[] bytes = new byte[file.LengthBytes];
            file.ReadAt(bytes, 0);
            return JsonSerializer.Deserialize(bytes, ManifestJson.Default.SnapshotManifest) ?? throw new StreamFormatException($"{what} is empty");
        }
        catch (Exception e) when (e is ChannelException or ConfigurationException or StreamTruncatedException or JsonException)
        {
            throw new StreamFormatException($"{what} cannot be read: {e.Message}", e);
        }
    }

    [JsonSourceGenerationOptions(PropertyNamingPolicy = JsonKnownNamingPolicy.KebabCaseLower, WriteIndented = true, RespectNullableAnnotations = true)]
    [JsonSerializable(typeof(SnapshotManifest))]
    private sealed partial class ManifestJson : JsonSerializerContext;
}
