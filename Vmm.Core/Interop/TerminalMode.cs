using System.Buffers.Binary;

namespace Vmm.Core.Interop;

/// <summary>
/// A terminal's mode: as the user has it, or raw, in which each byte is given on as it is typed and shown only by whoever receives it. Ctrl-C and
/// its like stay signals (QEMU: <c>qemu_chr_set_echo_stdio</c>). The user's mode comes back on dispose and however else the process ends by itself;
/// after SIGKILL it is for the user's <c>stty sane</c>. Thread-safe.
/// </summary>
internal sealed class TerminalMode : IDisposable
{
    // struct termios of the kernel: c_iflag, c_oflag, c_cflag, c_lflag, c_line, c_cc[19].
    internal const int Bytes = 36, LocalFlagsOffset = 12, ControlOffset = 17;
    internal const uint TCGETS = 0x5401, TCSETS = 0x5402;
    internal const uint ICANON = 2, ECHO = 8;
    private const uint TIOCGPGRP = 0x540f, ECHONL = 0x40, IEXTEN = 0x8000, CSIZE = 0x30, PARENB = 0x100, CS8 = 0x30;
    private const uint InputFlags = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x80 | 0x100 | 0x400; // IGNBRK BRKINT PARMRK ISTRIP INLCR IGNCR ICRNL IXON
    private const int VTIME = 5, VMIN = 6;

    private readonly OwnedFd _terminal;
    private readonly Lock _gate = new();
    private byte[]? _usual;

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
        Span<byte> mode = stackalloc byte[Bytes];
        return Ioctl.Invoke(fd, TCGETS, mode, out _) >= 0 ? new TerminalMode(fd) : null;
    }

    /// <summary>Raw or as it was. A terminal that a job in the background may not touch is left alone: the kernel would stop the process.</summary>
    internal void SetRaw(bool raw)
    {
        lock (_gate)
        {
            if (raw == _usual is not null) return;
            if (!raw)
            {
                Ioctl.Invoke(_terminal, TCSETS, _usual, out _);
                _usual = null;
                return;
            }
            byte[] usual = new byte[Bytes];
            if (IsOfAnotherJob() || Ioctl.Invoke(_terminal, TCGETS, usual, out _) < 0) return;
            byte[] mode = [.. usual];
            Change(mode, 0, clear: InputFlags, set: 0);
            Change(mode, 8, clear: CSIZE | PARENB, set: CS8);
            Change(mode, LocalFlagsOffset, clear: ECHO | ECHONL | ICANON | IEXTEN, set: 0);
            (mode[ControlOffset + VTIME], mode[ControlOffset + VMIN]) = (0, 1);
            if (Ioctl.Invoke(_terminal, TCSETS, mode, out _) >= 0) _usual = usual;
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
        Span<byte> group = stackalloc byte[4];
        return Ioctl.Invoke(_terminal, TIOCGPGRP, group, out _) >= 0 && BinaryPrimitives.ReadInt32LittleEndian(group) != LibC.getpgrp();
    }

    private static void Change(byte[] mode, int offset, uint clear, uint set)
    {
        Span<byte> word = mode.AsSpan(offset, 4);
        BinaryPrimitives.WriteUInt32LittleEndian(word, (BinaryPrimitives.ReadUInt32LittleEndian(word) & ~clear) | set);
    }
}
