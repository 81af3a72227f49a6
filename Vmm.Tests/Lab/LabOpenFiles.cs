using System.Buffers.Binary;
using System.Globalization;
using System.Text.RegularExpressions;
using Microsoft.Win32.SafeHandles;
using Vmm.Core.Interop;

namespace Vmm.Tests.Lab;

/// <summary>The open files of another process: finds them by name and compares them with those of this process.</summary>
internal static class LabOpenFiles
{
    private const int PidfdOpen = 434, PidfdGetFd = 438, Kcmp = 312, KcmpFile = 0;

    /// <summary>Numbers of the descriptors of a process whose name in /proc contains a text.</summary>
    internal static int[] Numbers(int pid, string name) =>
        [.. Directory.GetFiles($"/proc/{pid}/fd").Where(f => Target(f).Contains(name, StringComparison.Ordinal))
            .Select(static f => int.Parse(Path.GetFileName(f), CultureInfo.InvariantCulture)).Order()];

    /// <summary>Duplicates a descriptor of another process into this one.</summary>
    internal static OwnedFd Duplicate(int pid, string name)
    {
        int number = Numbers(pid, name) is [var first, ..] ? first : throw new InvalidDataException($"process {pid} has no '{name}' open");
        using var process = new OwnedFd(Checked(Posix.SystemCall(PidfdOpen, pid, 0, 0, 0, 0)));
        return new OwnedFd(Checked(Posix.SystemCall(PidfdGetFd, process.Number, number, 0, 0, 0)));
    }

    /// <summary>Whether a process has a descriptor for the same open file description.</summary>
    internal static bool Has(int pid, string name, OwnedFd file) =>
        Numbers(pid, name).Any(n => Posix.SystemCall(Kcmp, pid, Environment.ProcessId, KcmpFile, n, file.Number) == 0);

    /// <summary>The eventfds of a process: the kernel's eventfd-id and the present count of each.</summary>
    internal static SortedDictionary<int, ulong> EventFds(int pid)
    {
        var found = new SortedDictionary<int, ulong>();
        foreach (int number in Numbers(pid, "[eventfd]"))
        {
            string info;
            try
            {
                info = File.ReadAllText($"/proc/{pid}/fdinfo/{number}");
            }
            catch (IOException)
            {
                // The process closed the descriptor after the listing.
                continue;
            }
            if (Regex.Match(info, @"eventfd-id: (\d+)") is not { Success: true } id) continue;
            found[int.Parse(id.Groups[1].Value, CultureInfo.InvariantCulture)] = ulong.Parse(Regex.Match(info, @"eventfd-count:\s+([0-9a-f]+)").Groups[1].Value, NumberStyles.HexNumber, CultureInfo.InvariantCulture);
        }
        return found;
    }

    /// <summary>Whether the process exists and is no zombie.</summary>
    internal static bool IsAlive(int pid)
    {
        try
        {
            return !Regex.IsMatch(File.ReadAllText($"/proc/{pid}/stat"), @"\) [ZX] ");
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return false;
        }
    }

    /// <summary>Processes whose command line contains a text.</summary>
    internal static int[] Processes(string text) =>
        [.. Directory.GetDirectories("/proc").Where(d => int.TryParse(Path.GetFileName(d), out _) && CommandLine(d).Contains(text, StringComparison.Ordinal))
            .Select(static d => int.Parse(Path.GetFileName(d), CultureInfo.InvariantCulture))];

    private static string CommandLine(string process)
    {
        try
        {
            return File.ReadAllText(Path.Combine(process, "cmdline"));
        }
        catch (IOException)
        {
            return "";
        }
    }

    private static string Target(string link)
    {
        try
        {
            return new FileInfo(link).LinkTarget ?? "";
        }
        catch (IOException)
        {
            return "";
        }
    }

    private static int Checked(int result) => result >= 0 ? result : throw new IOException($"system call: {Posix.Describe(Posix.LastError)}");
}

/// <summary>A RAM block of another process, read through its memfd. This works also while the mapping's vaddr is suspended.</summary>
internal sealed class LabRam(int pid, string block) : IDisposable
{
    private readonly SafeFileHandle _file = File.OpenHandle($"/proc/{pid}/fd/{LabOpenFiles.Numbers(pid, $"memfd:vmm-ram-{block}")[0]}", FileMode.Open, FileAccess.Read, FileShare.ReadWrite);

    internal byte[] Read(long offset, int length)
    {
        byte[] bytes = new byte[length];
        Assert.That(RandomAccess.Read(_file, bytes, offset), Is.EqualTo(length));
        return bytes;
    }

    internal long Word(int index) => BinaryPrimitives.ReadInt64LittleEndian(Read(index * 8, 8));

    public void Dispose() => _file.Dispose();
}
