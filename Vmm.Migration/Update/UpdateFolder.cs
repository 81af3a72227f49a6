using Vmm.Core.Interop;

namespace Vmm.Migration.Update;

/// <summary>
/// The files of one update or rehearsal: sockets that are named for this process, in a directory that only this user can write.
/// <see cref="Dispose"/> removes the files, and the directory if it is a temporary one.
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

    /// <summary>The path of a temporary directory, else null.</summary>
    internal string? Temporary { get; }

    /// <summary>Uses an existing directory, or makes a temporary one for null.</summary>
    /// <exception cref="Core.Errors.ConfigurationException">Others can write in the directory.</exception>
    internal static UpdateFolder Open(string? directory)
    {
        if (directory is null) return new UpdateFolder(Directory.CreateTempSubdirectory("vmm-update-").FullName, isTemporary: true);
        PrivateDirectory.Check(directory);
        return new UpdateFolder(directory, isTemporary: false);
    }

    /// <summary>Returns a path in the directory, and removes a file there that an earlier process of this pid has left.</summary>
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
