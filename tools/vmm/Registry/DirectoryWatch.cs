namespace Vmm.Tools.Cli.Registry;

/// <summary>Reports changes in a directory. Without a free inotify watch it falls back to polling once a second.</summary>
internal sealed class DirectoryWatch : IDisposable
{
    private static readonly TimeSpan s_lookAgain = TimeSpan.FromSeconds(1);
    private readonly SemaphoreSlim _changed = new(0);
    private readonly FileSystemWatcher? _watcher;

    internal DirectoryWatch(string path)
    {
        try
        {
            _watcher = new FileSystemWatcher(path);
            _watcher.Created += (_, _) => _changed.Release();
            _watcher.Changed += (_, _) => _changed.Release();
            _watcher.Deleted += (_, _) => _changed.Release();
            _watcher.Renamed += (_, _) => _changed.Release();
            _watcher.EnableRaisingEvents = true;
        }
        catch (IOException)
        {
            _watcher?.Dispose();
            _watcher = null;
        }
    }

    /// <summary>Waits at most a second for a change since the watch began or the last wait ended.</summary>
    internal async Task WaitAsync(CancellationToken cancel)
    {
        await _changed.WaitAsync(s_lookAgain, cancel);
        while (_changed.Wait(0, CancellationToken.None))
        {
            // The caller reads the directory next, and sees these changes too.
        }
    }

    // Do not dispose the semaphore: a handler may still be running.
    public void Dispose() => _watcher?.Dispose();
}
