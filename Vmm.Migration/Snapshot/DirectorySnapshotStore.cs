using System.Text.Json;
using System.Text.Json.Serialization;
using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Migration.Channels;
using Vmm.Migration.Diagnostics;

namespace Vmm.Migration.Snapshot;

/// <summary>
/// Keeps snapshots as directories: <c>NAME/manifest.json</c>, and <c>NAME/vmstate</c> with the exact QEMU stream. A new one is written under a hidden name,
/// synced and renamed, so that a name holds a whole snapshot or none. As thread-safe as the file system is.
/// </summary>
/// <param name="directory">Parent directory; made with the first snapshot.</param>
/// <param name="logger">Log.</param>
internal sealed partial class DirectorySnapshotStore(string directory, ILogger logger)
{
    private const string ManifestFile = "manifest.json", StreamFile = "vmstate", AsidePrefix = ".aside-";

    internal string Location => directory;

    /// <summary>Refuses names that could lead out of the directory or be hidden in it.</summary>
    internal static void CheckName(string name)
    {
        bool ok = name.Length is > 0 and <= 128 && name[0] != '.' && name.All(static c => char.IsAsciiLetterOrDigit(c) || c is '-' or '_' or '.');
        if (!ok) throw new ConfigurationException($"snapshot name '{name}' must be 1 to 128 letters, digits, '-', '_' or '.', and not start with '.'");
    }

    internal bool Exists(string name) => Directory.Exists(Path.Combine(directory, name));

    /// <summary>Makes a private directory for a new snapshot and opens its stream.</summary>
    internal (string Aside, FileChannel Stream) Begin()
    {
        try
        {
            Directory.CreateDirectory(directory);
            string aside = Path.Combine(directory, AsidePrefix + Guid.NewGuid().ToString("N"));
            Directory.CreateDirectory(aside, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
            try
            {
                return (aside, FileChannel.Create(Path.Combine(aside, StreamFile), 0));
            }
            catch
            {
                Directory.Delete(aside, recursive: true);
                throw;
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new ChannelException($"cannot write to snapshot directory '{directory}': {e.Message}", Errno.EIO, e);
        }
    }

    /// <summary>Writes the manifest and renames the directory to the snapshot's name.</summary>
    internal void Commit(string aside, SnapshotManifest manifest, bool overwrite)
    {
        string target = Path.Combine(directory, manifest.Name);
        string file = Path.Combine(aside, ManifestFile);
        try
        {
            File.WriteAllBytes(file, JsonSerializer.SerializeToUtf8Bytes(manifest, ManifestJson.Default.SnapshotManifest));
            Sync(file);
            Sync(aside);
            if (overwrite && Directory.Exists(target))
            {
                string old = Path.Combine(directory, AsidePrefix + Guid.NewGuid().ToString("N"));
                Directory.Move(target, old);
                Directory.Move(aside, target);
                Directory.Delete(old, recursive: true);
            }
            else
            {
                Directory.Move(aside, target);
            }
            Sync(directory);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new ChannelException($"cannot store snapshot '{manifest.Name}' in '{directory}': {e.Message}", Errno.EIO, e);
        }
    }

    internal static void Discard(string aside)
    {
        if (Directory.Exists(aside)) Directory.Delete(aside, recursive: true);
    }

    internal (SnapshotManifest Manifest, Func<FileChannel> Open) Find(string name)
    {
        CheckName(name);
        string folder = Path.Combine(directory, name);
        if (!Directory.Exists(folder)) throw new DeviceNotFoundException($"Snapshot '{name}' does not exist in one or more devices");
        return (ReadManifest(folder), () => FileChannel.Open(Path.Combine(folder, StreamFile), 0));
    }

    internal bool Delete(string name)
    {
        CheckName(name);
        string folder = Path.Combine(directory, name);
        if (!Directory.Exists(folder)) return false;
        string aside = Path.Combine(directory, AsidePrefix + Guid.NewGuid().ToString("N"));
        Directory.Move(folder, aside);
        Directory.Delete(aside, recursive: true);
        return true;
    }

    internal IReadOnlyList<SnapshotManifest> List()
    {
        var all = new List<SnapshotManifest>();
        if (!Directory.Exists(directory)) return all;
        foreach (string folder in Directory.GetDirectories(directory))
        {
            if (Path.GetFileName(folder).StartsWith('.')) continue;
            try
            {
                all.Add(ReadManifest(folder));
            }
            catch (VmmException e)
            {
                MigrationLog.SnapshotSkipped(logger, Path.GetFileName(folder), e.Message);
            }
        }
        return [.. all.OrderBy(static m => m.CreatedUtc)];
    }

    private static SnapshotManifest ReadManifest(string folder)
    {
        string file = Path.Combine(folder, ManifestFile);
        try
        {
            return JsonSerializer.Deserialize(File.ReadAllBytes(file), ManifestJson.Default.SnapshotManifest)
                ?? throw new StreamFormatException($"snapshot '{Path.GetFileName(folder)}': {ManifestFile} is empty");
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or JsonException)
        {
            throw new StreamFormatException($"snapshot '{Path.GetFileName(folder)}': {ManifestFile} cannot be read: {e.Message}", e);
        }
    }

    private static void Sync(string path)
    {
        using OwnedFd fd = Posix.Open(path, Posix.O_RDONLY, 0, out Errno errno) ?? throw Posix.Error($"cannot open '{path}'", errno);
        Posix.Fsync(fd);
    }

    [JsonSourceGenerationOptions(PropertyNamingPolicy = JsonKnownNamingPolicy.KebabCaseLower, WriteIndented = true)]
    [JsonSerializable(typeof(SnapshotManifest))]
    private sealed partial class ManifestJson : JsonSerializerContext;
}
