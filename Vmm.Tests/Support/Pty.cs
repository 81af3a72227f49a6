using Vmm.Core.Errors;
using Vmm.Core.Interop;

namespace Vmm.Tests.Support;

/// <summary>A pseudo-terminal. The test has the master side.</summary>
internal sealed class Pty : IDisposable
{
    private const uint SetLock = 0x40045431, GetNumber = 0x80045430; // TIOCSPTLCK, TIOCGPTN
    private const uint GetMode = 0x5401; // TCGETS
    private const int ModeBytes = 36, LocalFlagsOffset = 12;

    private readonly OwnedFd _master, _terminal;

    internal Pty()
    {
        _master = Posix.Open("/dev/ptmx", Posix.O_RDWR | Posix.O_NOCTTY, 0, out Errno errno) ?? throw new IOException($"/dev/ptmx: {errno}");
        int value = 0;
        Assert.That(Ioctl.Invoke(_master, SetLock, ref value, out _), Is.Zero);
        Assert.That(Ioctl.Invoke(_master, GetNumber, ref value, out _), Is.Zero);
        Path = $"/dev/pts/{value}";
        // Keep the terminal open, so that its mode stays when a program closes it.
        _terminal = Posix.Open(Path, Posix.O_RDWR | Posix.O_NOCTTY, 0, out errno) ?? throw new IOException($"{Path}: {errno}");
    }

    internal string Path { get; }

    /// <summary>The kernel's <c>struct termios</c>.</summary>
    internal byte[] Mode
    {
        get
        {
            byte[] mode = new byte[ModeBytes];
            Assert.That(Ioctl.Invoke(_terminal, GetMode, mode, out _), Is.Zero);
            return mode;
        }
    }

    /// <summary>The c_lflag of <see cref="Mode"/>.</summary>
    internal uint LocalFlags => BitConverter.ToUInt32(Mode, LocalFlagsOffset);

    /// <summary>Types one key.</summary>
    internal void Type(byte key) => Assert.That(Posix.Write(_master, [key], out _), Is.EqualTo(1));

    /// <summary>Waits for the next byte that the terminal shows.</summary>
    internal byte Shown()
    {
        Posix.Poll(_master, Posix.POLLIN, null, 30_000, out _);
        byte[] one = new byte[1];
        Assert.That(Posix.Read(_master, one, out _), Is.EqualTo(1), "the terminal showed nothing in time");
        return one[0];
    }

    public void Dispose()
    {
        _terminal.Dispose();
        _master.Dispose();
    }
}
