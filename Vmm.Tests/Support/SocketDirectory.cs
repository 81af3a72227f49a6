namespace Vmm.Tests.Support;

/// <summary>A private directory with a short path (UNIX sockets allow 107 bytes), removed on dispose.</summary>
internal sealed class SocketDirectory : IDisposable
{
    private readonly DirectoryInfo _directory = Directory.CreateTempSubdirectory("vmm-");

    internal string Path => _directory.FullName;

    internal string this[string name] => System.IO.Path.Combine(Path, name);

    public void Dispose() => _directory.Delete(recursive: true);
}
