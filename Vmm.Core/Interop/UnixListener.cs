using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

/// <summary>
/// A listening UNIX socket at a path. The path appears only when the socket listens, so a client that waits for the path can connect at once. The
/// socket has mode 0600; missing folders are created with mode 0700; a folder in which another user could replace the socket is refused. Dispose removes
/// the file only if it is still this socket. One owner; not thread-safe.
/// </summary>
public sealed class UnixListener : IDisposable
{
    private const uint OwnerOnly = 0x180, OwnerOnlyFolder = 0x1C0, WritableByOthers = 0x002, Sticky = 0x200; // 0600, 0700, 0002, 01000
    private const int ProbeMs = 1000;

    private readonly FileStatus? _file;
    private bool _disposed;

    private UnixListener(OwnedFd socket, string path, FileStatus? file) => (Socket, Path, _file) = (socket, path, file);

    /// <summary>The listening socket, in blocking mode.</summary>
    public OwnedFd Socket { get; }

    /// <summary>Path of the socket.</summary>
    public string Path { get; private set; }

    /// <summary>False to keep the file on dispose, because another process listens there now.</summary>
    internal bool RemovesFile { get; set; } = true;

    /// <summary>Listens at a path. Replaces a socket on which nobody listens; refuses anything else at the path, symbolic links included.</summary>
    /// <param name="path">1 to 107 bytes of UTF-8.</param>
    /// <param name="backlog">Number of connections that may wait for accept.</param>
    /// <exception cref="ConfigurationException">The path is too long, in use, or not a socket of this user, or its folder is not safe.</exception>
    /// <exception cref="ChannelException">The operating system refused.</exception>
    public static UnixListener Listen(string path, int backlog)
    {
        _ = Posix.UnixAddress(path);
        return ListenAnywhere(path, backlog);
    }

    /// <summary>
    /// As <see cref="Listen"/>, at a path of any length; only the file's name must be short. Programs that cannot shorten a path do not reach a socket whose
    /// path has more than 107 bytes.
    /// </summary>
    internal static UnixListener ListenAnywhere(string path, int backlog)
    {
        string folder = System.IO.Path.GetDirectoryName(path) is { Length: > 0 } name ? name : ".";
        MakeFolder(folder, path);
        CheckFolder(folder, path);
        RemoveStale(path);
        OwnedFd socket = Posix.Socket(Posix.AF_UNIX);
        try
        {
            return new UnixListener(socket, path, Publish(socket, folder, path, backlog));
        }
        catch
        {
            socket.Dispose();
            throw;
        }
    }

    /// <summary>Takes over a listening socket from another process; from now on this process removes its file.</summary>
    internal static UnixListener Adopt(OwnedFd socket, string path) => new(socket, path, Look(path));

    /// <summary>Moves the socket's file to another path of the same file system and replaces a socket there. Connections are not affected.</summary>
    internal void MoveTo(string path)
    {
        File.Move(Path, path, overwrite: true);
        Path = path;
    }

    /// <summary>Stops listening and removes the file.</summary>
    public void Dispose()
    {
        if (_disposed) return;
        _disposed = true;
        // Compare before the socket is closed, because until then no other file can have its inode.
        if (RemovesFile && _file is { } made && Look(Path) is { } now && now.IsSameFile(made)) File.Delete(Path);
        Socket.Dispose();
    }

    /// <summary>Binds to a secret name, listens, and then links the path to the socket.</summary>
    private static FileStatus Publish(OwnedFd socket, string folder, string path, int backlog)
    {
        string temporary = "." + System.IO.Path.GetRandomFileName(), hidden = System.IO.Path.Combine(folder, temporary);
        using OwnedFd directory = Posix.Open(folder, Posix.O_PATH | Posix.O_DIRECTORY, 0, out Errno errno) ?? throw Refused(path, errno);
        // Refuses a name that no client could connect to.
        _ = Posix.UnixAddressIn(directory, path);
        // A socket address has room for 107 bytes; this path is short, however long the folder's name is.
        errno = Posix.Bind(socket, Posix.UnixAddressIn(directory, temporary));
        if (errno != Errno.None) throw Refused(path, errno);
        try
        {
            // No client can connect before listen, so the wider mode until here does no harm.
            errno = Posix.Chmod(hidden, OwnerOnly);
            if (errno == Errno.None) errno = Posix.Listen(socket, backlog);
            FileStatus? file = Look(hidden);
            // A link fails if another process has made a socket there meanwhile; a rename would replace it.
            if (errno == Errno.None) errno = Posix.Link(hidden, path);
            if (errno == Errno.EEXIST) throw InUse(path);
            return errno == Errno.None && file is { } made ? made : throw Refused(path, errno);
        }
        finally
        {
            File.Delete(hidden);
        }
    }

    private static void MakeFolder(string folder, string path)
    {
        if (Directory.Exists(folder)) return;
        if (System.IO.Path.GetDirectoryName(folder) is { Length: > 0 } parent) MakeFolder(parent, path);
        Errno errno = Posix.MakeDirectory(folder, OwnerOnlyFolder);
        // Another process may have created the folder at the same time.
        if (errno != Errno.None && !Directory.Exists(folder))
            throw new ConfigurationException($"cannot listen at '{path}': folder '{folder}' cannot be created: {Posix.Describe(errno)}");
    }

    /// <summary>Refuses a folder in which somebody else could put another socket in place of this one.</summary>
    private static void CheckFolder(string folder, string path)
    {
        using OwnedFd? fd = Posix.Open(folder, Posix.O_PATH | Posix.O_DIRECTORY, 0, out Errno errno);
        if (fd is null || (errno = Posix.Stat(fd, out FileStatus status)) != Errno.None) throw Refused(path, errno);
        uint user = PrivateDirectory.CurrentUserId;
        if (status.UserId != user && status.UserId != 0)
            throw new ConfigurationException($"cannot listen at '{path}': folder '{folder}' belongs to user {status.UserId}, who could replace the socket; expected {user} or root");
        if ((status.Permissions & WritableByOthers) != 0 && (status.Permissions & Sticky) == 0)
        {
            throw new ConfigurationException($"cannot listen at '{path}': every user can write in folder '{folder}' and could replace the socket")
            {
                Hint = $"chmod o-w '{folder}', or another folder",
            };
        }
    }

    private static void RemoveStale(string path)
    {
        if (Look(path) is not { } found) return;
        if (!found.IsSocket) throw new ConfigurationException($"cannot listen at '{path}': the path exists and is not a socket");
        if (found.UserId != PrivateDirectory.CurrentUserId) throw new ConfigurationException($"cannot listen at '{path}': a socket of user {found.UserId} is there");
        using OwnedFd probe = Posix.Socket(Posix.AF_UNIX);
        if (Posix.ConnectUnix(probe, path, null, ProbeMs) != Errno.ECONNREFUSED) throw InUse(path);
        File.Delete(path);
    }

    /// <summary>Returns the status of the file at a path, without following a symbolic link; null if there is none.</summary>
    private static FileStatus? Look(string path)
    {
        using OwnedFd? fd = Posix.Open(path, Posix.O_PATH | Posix.O_NOFOLLOW, 0, out Errno errno);
        if (fd is null && errno != Errno.ENOENT) throw Refused(path, errno);
        return fd is not null && Posix.Stat(fd, out FileStatus status) == Errno.None ? status : null;
    }

    private static ConfigurationException InUse(string path) => new($"cannot listen at '{path}': it is in use by another process");

    private static ChannelException Refused(string path, Errno errno) => Posix.Error($"cannot listen at '{path}'", errno);
}
