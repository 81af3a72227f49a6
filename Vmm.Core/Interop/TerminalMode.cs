using Tmds.Linux;

namespace Vmm.Core.Interop;

/// <summary>
/// Switches a terminal between the user's mode and raw mode, in which it passes on each byte as typed and leaves the echo to the receiver. Ctrl-C and
/// similar keys stay signals (QEMU: <c>qemu_chr_set_echo_stdio</c>). Dispose and a normal or abnormal exit restore the user's mode; after SIGKILL the
/// user must run <c>stty sane</c>. Thread-safe.
/// </summary>
internal sealed unsafe class TerminalMode : IDisposable
{
    private readonly OwnedFd _terminal;
    private readonly Lock _gate = new();
    private termios? _usual;

    private TerminalMode(OwnedFd terminal)
    {
        _terminal = terminal;
        AppDomain.CurrentDomain.ProcessExit += OnExit;
        AppDomain.CurrentDomain.UnhandledException += OnExit;
    }

    /// <summary>Makes one for a terminal.</summary>
    /// <param name="fd">The caller's; must stay open until the result is disposed.</param>
    /// <returns>Null if the descriptor is not a terminal.</returns>
    internal static TerminalMode? Of(OwnedFd fd)
    {
        return Read(fd, out _) ? new TerminalMode(fd) : null;
    }

    /// <summary>
    /// Sets raw mode or the user's mode. Does nothing while another job has the terminal, because the kernel would stop this process for the attempt.
    /// </summary>
    internal void SetRaw(bool raw)
    {
        lock (_gate)
        {
            if (raw == _usual is not null) return;
            if (_usual is { } before)
            {
                Write(_terminal, before);
                _usual = null;
                return;
            }
            if (IsOfAnotherJob() || !Read(_terminal, out termios usual)) return;
            termios mode = usual;
            mode.c_iflag &= ~(LibC.IGNBRK | LibC.BRKINT | LibC.PARMRK | LibC.ISTRIP | LibC.INLCR | LibC.IGNCR | LibC.ICRNL | LibC.IXON);
            mode.c_cflag = (mode.c_cflag & ~(LibC.CSIZE | LibC.PARENB)) | LibC.CS8;
            mode.c_lflag &= ~(LibC.ECHO | LibC.ECHONL | LibC.ICANON | LibC.IEXTEN);
            (mode.c_cc[LibC.VTIME], mode.c_cc[LibC.VMIN]) = (0, 1);
            if (Write(_terminal, mode)) _usual = usual;
        }
    }

    public void Dispose()
    {
        AppDomain.CurrentDomain.ProcessExit -= OnExit;
        AppDomain.CurrentDomain.UnhandledException -= OnExit;
        SetRaw(false);
    }

    private void OnExit(object? sender, EventArgs e) => SetRaw(false);

    /// <summary>True if this is our controlling terminal and another process group is in its foreground.</summary>
    private bool IsOfAnotherJob()
    {
        using FdInUse use = _terminal.Use();
        int group = LibC.tcgetpgrp(use.Number);
        return group >= 0 && group != LibC.getpgrp();
    }

    private static bool Read(OwnedFd terminal, out termios mode)
    {
        using FdInUse use = terminal.Use();
        // SAFETY: the C library fills in one structure of the caller's.
        fixed (termios* p = &mode) return LibC.tcgetattr(use.Number, p) == 0;
    }

    private static bool Write(OwnedFd terminal, termios mode)
    {
        using FdInUse use = terminal.Use();
        // SAFETY: the structure is on this frame.
        return LibC.tcsetattr(use.Number, (int)LibC.TCSANOW, &mode) == 0;
    }
}
