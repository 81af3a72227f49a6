using Tmds.Linux;

namespace Vmm.Core.Interop;

/// <summary>
/// A terminal's mode: as the user has it, or raw, in which each byte is given on as it is typed and shown only by whoever receives it. Ctrl-C and
/// its like stay signals (QEMU: <c>qemu_chr_set_echo_stdio</c>). The user's mode comes back on dispose and however else the process ends by itself;
/// after SIGKILL it is for the user's <c>stty sane</c>. Thread-safe.
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

    /// <summary>The mode of a terminal.</summary>
    /// <param name="fd">The descriptor; the caller's, open until the mode is disposed.</param>
    /// <returns>Null when it is no terminal.</returns>
    internal static TerminalMode? Of(OwnedFd fd)
    {
        return Read(fd, out _) ? new TerminalMode(fd) : null;
    }

    /// <summary>Raw or as it was. A terminal that a job in the background may not touch is left alone: the kernel would stop the process.</summary>
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

    /// <summary>Whether it is our terminal and another process group is in its foreground.</summary>
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
