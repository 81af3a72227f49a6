using Vmm.Core.Interop;

namespace Vmm.Migration.Update;

/// <summary>
/// The files of one update or rehearsal: sockets named for this process in a directory of this user alone. <see cref="Dispose"/> removes them, and
/// the directory if it was made for them.
/// </summary>
internal sealed class UpdateFolder : IDisposable
{
    private readonly List<string> _files = [];
    private readonly string _directory;

    private UpdateFolder(string directory, bool isTemporary)
    {
        _directory = directory;
        Temporary = isTemporary ? directory : null;
    }

    /// <summary>The directory if it is a temporary one, or null.</summary>
    internal string? Temporary { get; }

    /// <summary>Takes a directory.</summary>
    /// <param name="directory">An existing one, or null to make a temporary one.</param>
    /// <exception cref="Core.Errors.ConfigurationException">Others can write in the directory.</exception>
    internal static UpdateFolder Open(string? directory)
    {
        if (directory is null) return new UpdateFolder(Directory.CreateTempSubdirectory("vmm-update-").FullName, isTemporary: true);
        PrivateDirectory.Check(directory);
        return new UpdateFolder(directory, isTemporary: false);
    }

    /// <summary>A path in the directory. A file that an earlier process of this pid has left there is removed.</summary>
    internal string Claim(string suffix)
    {
        string path = Path.Combine(_directory, $"{Environment.ProcessId}{suffix}");
        File.Delete(path);
        _files.Add(path);
        return path;
    }

    public void Dispose()
    {
        foreach (string file in _files) File.Delete(file);
        if (Temporary is not null) Directory.Delete(Temporary, recursive: true);
    }
}
