using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Migration.Channels;
using Vmm.Migration.Diagnostics;

namespace Vmm.Migration.Snapshot;

/// <summary>
/// Keeps snapshots as directories: <c>NAME/manifest.json</c>, and <c>NAME/vmstate</c> with the exact QEMU stream. A new one is written under a hidden name,
/// synced and renamed, so that a name holds a whole snapshot or none, also after a loss of power. A hidden directory is locked while it is written; one that
/// is not was left by a process that died, and the next snapshot removes it. One thread at a time writes; any thread may read.
/// </summary>
/// <param name="directory">Parent directory; made with the first snapshot.</param>
/// <param name="logger">Log.</param>
/// <param name="sync">What is called instead of fsync(2), or null.</param>
internal sealed class DirectorySnapshotStore(string directory, ILogger logger, Func<OwnedFd, Errno>? sync = null)
{
    private const string StreamFile = "vmstate", AsidePrefix = ".aside-";
    private const UnixFileMode OwnerOnly = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute;

    private readonly Func<OwnedFd, Errno> _sync = sync ?? Posix.Fsync;
    private OwnedFd? _lock;

    internal string Location => directory;

    /// <summary>Refuses names that could lead out of the directory or be hidden in it.</summary>
    internal static void CheckName(string name)
    {
        bool ok = name.Length is > 0 and <= 128 && name[0] != '.' && name.All(static c => char.IsAsciiLetterOrDigit(c) || c is '-' or '_' or '.');
        if (!ok) throw new ConfigurationException($"snapshot name '{name}' must be 1 to 128 letters, digits, '-', '_' or '.', and not start with '.'");
    }

    internal bool Exists(string name) => Directory.Exists(Path.Combine(directory, name));

    /// <summary>Makes a private directory for a new snapshot and opens its stream. <see cref="Discard"/> must follow, after a commit too.</summary>
    /// <exception cref="ChannelException">The directory cannot be written.</exception>
    internal (string Aside, FileChannel Stream) Begin()
    {
        try
        {
            MakeDirectory();
            RemoveLeftovers();
            string aside;
            do
            {
                aside = NewAside();
                Directory.CreateDirectory(aside, OwnerOnly);
                // Null if another process, which looks for leftovers, came between these two calls.
                _lock = Lock(aside);
            }
            while (_lock is null);
            try
            {
                return (aside, FileChannel.Create(Path.Combine(aside, StreamFile), 0, _sync));
            }
            catch
            {
                Discard(aside);
                throw;
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new ChannelException($"cannot write to snapshot directory '{directory}': {e.Message}", Errno.EIO, e);
        }
    }

    /// <summary>Writes the manifest and renames the directory to the snapshot's name.</summary>
    /// <exception cref="ChannelException">The snapshot is not stored, and one that was to be replaced is still there.</exception>
    internal void Commit(string aside, SnapshotManifest manifest, bool overwrite)
    {
        string target = Path.Combine(directory, manifest.Name);
        try
        {
            using (FileChannel file = FileChannel.Create(Path.Combine(aside, ManifestFile.Name), 0, _sync))
            {
                file.Write(ManifestFile.Write(manifest));
                // Syncs the directory too, and with it the name of the stream, which is synced already.
                file.Drain(TimeSpan.Zero);
            }
            bool replaces = overwrite && Directory.Exists(target);
            Put(aside, target, replaces);
            Errno errno = Posix.SyncDirectory(directory, _sync);
            if (errno == Errno.None) return;
            // The name might be gone after a loss of power, so the snapshot must not be reported, nor stay in place of the one before.
            Put(target, aside, replaces);
            throw Posix.Error($"cannot sync '{directory}'", errno);
        }
        catch (ChannelException e)
        {
            throw new ChannelException($"cannot store snapshot '{manifest.Name}' in '{directory}'", e.Errno, e);
        }
    }

    /// <summary>Removes what is left under a hidden name; after a commit that is the replaced snapshot or nothing. Never throws.</summary>
    internal void Discard(string aside)
    {
        Remove(aside);
        _lock?.Dispose();
        _lock = null;
    }

    /// <summary>Finds a snapshot.</summary>
    /// <exception cref="DeviceNotFoundException">There is none of that name.</exception>
    /// <exception cref="VmmException">The manifest is damaged.</exception>
    internal (SnapshotManifest Manifest, Func<FileChannel> Open) Find(string name)
    {
        CheckName(name);
        string folder = Path.Combine(directory, name);
        if (!Directory.Exists(folder)) throw new DeviceNotFoundException($"Snapshot '{name}' does not exist in one or more devices");
        return (ManifestFile.Read(folder), () => FileChannel.Open(Path.Combine(folder, StreamFile), 0));
    }

    /// <summary>Deletes a snapshot; false if there is none of that name.</summary>
    /// <exception cref="ChannelException">It cannot be deleted and is still there.</exception>
    internal bool Delete(string name)
    {
        CheckName(name);
        string folder = Path.Combine(directory, name);
        if (!Directory.Exists(folder)) return false;
        string aside = NewAside();
        Errno errno = Posix.Rename(folder, aside);
        if (errno != Errno.None) throw Posix.Error($"cannot delete snapshot '{name}' in '{directory}'", errno);
        Remove(aside);
        return true;
    }

    /// <summary>The manifests of all snapshots, oldest first; a damaged one is logged and left out.</summary>
    /// <exception cref="ChannelException">The directory cannot be read.</exception>
    internal IReadOnlyList<SnapshotManifest> List()
    {
        var all = new List<SnapshotManifest>();
        foreach (string folder in Folders())
        {
            if (Path.GetFileName(folder).StartsWith('.')) continue;
            try
            {
                all.Add(ManifestFile.Read(folder));
            }
            catch (VmmException e)
            {
                MigrationLog.SnapshotSkipped(logger, Path.GetFileName(folder), VmmException.Describe(e));
            }
        }
        return [.. all.OrderBy(static m => m.CreatedUtc)];
    }

    private string NewAside() => Path.Combine(directory, AsidePrefix + Guid.NewGuid().ToString("N"));

    private string[] Folders()
    {
        try
        {
            return Directory.Exists(directory) ? Directory.GetDirectories(directory) : [];
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new ChannelException($"cannot read snapshot directory '{directory}': {e.Message}", Errno.EIO, e);
        }
    }

    /// <summary>Makes the directory if it is missing, and syncs the names of the directories that this made.</summary>
    private void MakeDirectory()
    {
        var made = new List<string>();
        for (string? one = Path.GetFullPath(directory); one is not null && !Directory.Exists(one); one = Path.GetDirectoryName(one)) made.Add(one);
        if (made.Count == 0) return;
        Directory.CreateDirectory(directory, OwnerOnly);
        foreach (string one in made)
        {
            Errno errno = Posix.SyncDirectory(Path.GetDirectoryName(one)!, _sync);
            if (errno == Errno.None) continue;
            // A later attempt must find them missing, so that it syncs their names.
            made.ForEach(Directory.Delete);
            throw Posix.Error($"cannot sync the directory of '{one}'", errno);
        }
    }

    /// <summary>Gives a directory another name; one that has this name already gets the first one's.</summary>
    private void Put(string from, string to, bool exchange)
    {
        Errno errno = Posix.Rename(from, to, exchange);
        if (exchange && errno == Errno.EINVAL)
        {
            // This file system cannot exchange names in one step.
            string third = NewAside();
            errno = Posix.Rename(to, third);
            if (errno == Errno.None) errno = Posix.Rename(from, to);
            if (errno == Errno.None) errno = Posix.Rename(third, from);
        }
        if (errno != Errno.None) throw Posix.Error($"cannot rename '{from}' to '{to}'", errno);
    }

    private void RemoveLeftovers()
    {
        foreach (string folder in Directory.GetDirectories(directory, AsidePrefix + "*"))
        {
            using OwnedFd? held = Lock(folder);
            if (held is not null) Remove(folder);
        }
    }

    /// <summary>Returns the lock of a directory, which ends when it is disposed; null if another process writes there.</summary>
    private static OwnedFd? Lock(string folder)
    {
        OwnedFd? fd = Posix.Open(folder, Posix.O_RDONLY | Posix.O_DIRECTORY | Posix.O_NOFOLLOW, 0, out _);
        if (fd is null || Posix.TryLock(fd) == Errno.None) return fd;
        fd.Dispose();
        return null;
    }

    private void Remove(string folder)
    {
        try
        {
            if (Directory.Exists(folder)) Directory.Delete(folder, recursive: true);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            MigrationLog.SnapshotLeftover(logger, folder, e.Message);
        }
    }
}
