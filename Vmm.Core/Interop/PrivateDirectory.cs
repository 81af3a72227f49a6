using Tmds.Linux;
using Vmm.Core.Errors;

namespace Vmm.Core.Interop;

/// <summary>
/// Directories for control sockets that only this user can enter, so that nobody else can put a socket or a link at our path. Stateless, thread-safe.
/// </summary>
public static class PrivateDirectory
{
    private const uint OwnerOnly = 0x1C0; // 0700

    /// <summary>The effective user id of this process.</summary>
    public static uint CurrentUserId => LibC.geteuid();

    /// <summary>Creates a directory with mode 0700 if it does not exist, then checks it. The parent must exist.</summary>
    /// <param name="path">An absolute path.</param>
    /// <exception cref="ConfigurationException">The directory cannot be created, or <see cref="Check"/> refuses it.</exception>
    public static void Ensure(string path)
    {
        // If the path exists, whatever it is, Check decides about it.
        if (Posix.MakeDirectory(path, OwnerOnly) is not (Errno.None or Errno.EEXIST) and var errno)
            throw new ConfigurationException($"directory '{path}' cannot be created: {Posix.Describe(errno)}");
        Check(path);
    }

    /// <summary>Checks that a path is a directory, belongs to this user and has mode 0700.</summary>
    /// <param name="path">An absolute path.</param>
    /// <exception cref="ConfigurationException">The path is a link or not a directory, has another owner, or its mode is not 0700.</exception>
    public static void Check(string path)
    {
        using OwnedFd? fd = Posix.Open(path, Posix.O_RDONLY | Posix.O_DIRECTORY | Posix.O_NOFOLLOW, 0, out Errno errno);
        if (fd is null)
        {
            string why = errno is Errno.ENOTDIR or (Errno)40 ? "it is a symbolic link or not a directory" : Posix.Describe(errno);
            throw new ConfigurationException($"directory '{path}' is not safe to use: {why}");
        }
        errno = Posix.Stat(fd, out FileStatus status);
        if (errno != Errno.None) throw Posix.Error($"directory '{path}'", errno);
        if (status.UserId != CurrentUserId)
            throw new ConfigurationException($"directory '{path}' is not safe to use: it belongs to user {status.UserId}, not to {CurrentUserId}");
        if (status.Permissions != OwnerOnly)
        {
            throw new ConfigurationException(
                $"directory '{path}' is not safe to use: its mode is {Convert.ToString(status.Permissions, 8)}, not 700") { Hint = $"chmod 700 '{path}'" };
        }
    }
}
