using Tmds.Linux;

namespace Vmm.Core.Interop;

// Constants for callers of Posix, which do not use Tmds.LibC.
public static partial class Posix
{
    internal static int O_RDONLY => LibC.O_RDONLY;
    internal static int O_WRONLY => LibC.O_WRONLY;
    /// <summary>Opens for reading and writing.</summary>
    public static int O_RDWR => LibC.O_RDWR;
    internal static int O_CREAT => LibC.O_CREAT;
    internal static int O_EXCL => LibC.O_EXCL;
    internal static int O_TRUNC => LibC.O_TRUNC;
    internal static int O_NONBLOCK => LibC.O_NONBLOCK;
    internal static int O_NOCTTY => LibC.O_NOCTTY;
    internal static int O_CLOEXEC => LibC.O_CLOEXEC;
    internal static int O_DIRECTORY => LibC.O_DIRECTORY;
    internal static int O_NOFOLLOW => LibC.O_NOFOLLOW;
    internal static int O_PATH => LibC.O_PATH;

    /// <summary>There is something to read, or the end.</summary>
    public static short POLLIN => LibC.POLLIN;
    internal static short POLLOUT => LibC.POLLOUT;
    internal static short POLLERR => LibC.POLLERR;
    internal static short POLLHUP => LibC.POLLHUP;
    internal static short POLLNVAL => LibC.POLLNVAL;
    internal static short POLLRDHUP => LibC.POLLRDHUP;

    /// <summary>Family of UNIX sockets.</summary>
    public static int AF_UNIX => LibC.AF_UNIX;
    internal static int AF_INET => LibC.AF_INET;
    internal static int AF_INET6 => LibC.AF_INET6;

    internal static int SHUT_RD => LibC.SHUT_RD;
    internal static int SHUT_WR => LibC.SHUT_WR;
    /// <summary>Ends both directions.</summary>
    public static int SHUT_RDWR => LibC.SHUT_RDWR;

    internal static int MSG_PEEK => LibC.MSG_PEEK;
    internal static int MSG_NOSIGNAL => LibC.MSG_NOSIGNAL;
    internal static int MSG_DONTWAIT => LibC.MSG_DONTWAIT;
}
