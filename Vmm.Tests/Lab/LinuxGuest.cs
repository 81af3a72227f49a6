using System.Text;
using Vmm.Tests.Support;

namespace Vmm.Tests.Lab;

/// <summary>
/// Debian's kernel as the guest of a <c>vmm</c> in the lab: the lab's own kernel, an initramfs with busybox, modules and a script as first process.
/// </summary>
internal static class LinuxGuest
{
    internal const string Kernel = "/guest/vmlinuz";

    /// <summary>
    /// The lab's processor is emulated, and its emulator does not tell a hypervisor of XSETBV: a guest that uses XSAVE would lose its registers.
    /// </summary>
    internal const string CommandLine = "console=ttyS0 panic=-1 noxsave";

    private const string Prologue = """
        #!/bin/busybox sh
        /bin/busybox --install -s /bin; export PATH=/bin
        mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp

        """;

    /// <summary>What the kernel's log has of warnings and worse, between two lines; a program, so that a shell started later has it too.</summary>
    private const string Warnings = "#!/bin/sh\necho WARNINGS; dmesg -r | grep -E '^<[0-4]>'; echo END\n";

    /// <summary>Writes an initramfs.</summary>
    /// <param name="path">Where to.</param>
    /// <param name="script">What the first process does; it powers off at its end.</param>
    /// <param name="modules">Modules of the lab to put into /m.</param>
    internal static void WriteInitrd(string path, string script, params string[] modules)
    {
        using FileStream file = File.Create(path);
        foreach (string folder in (string[])["bin", "proc", "sys", "dev", "tmp", "m"]) Entry(file, folder, 0x41ed, []);
        Entry(file, "bin/busybox", 0x81ed, File.ReadAllBytes("/bin/busybox"));
        Entry(file, "bin/warnings", 0x81ed, Encoding.ASCII.GetBytes(Warnings));
        foreach (string module in modules) Entry(file, $"m/{module}.ko", 0x81a4, File.ReadAllBytes($"/m/{module}.ko"));
        Entry(file, "init", 0x81ed, Encoding.ASCII.GetBytes((Prologue + script + "\npoweroff -f\n").ReplaceLineEndings("\n")));
        Entry(file, "TRAILER!!!", 0, []);
    }

    /// <summary>Waits until a file of console output has some text after a position.</summary>
    /// <returns>The output so far.</returns>
    internal static async Task<string> WaitFor(string console, string text, TimeSpan deadline)
    {
        using var limit = new CancellationTokenSource(deadline);
        string all = "";
        using var changed = new SemaphoreSlim(0);
        using var watcher = new FileSystemWatcher(Path.GetDirectoryName(console)!, Path.GetFileName(console)!) { EnableRaisingEvents = true };
        watcher.Changed += (_, _) => changed.Release();
        watcher.Created += (_, _) => changed.Release();
        while (true)
        {
            all = Read(console);
            if (all.Contains(text, StringComparison.Ordinal)) return all;
            try
            {
                await changed.WaitAsync(limit.Token);
            }
            catch (OperationCanceledException)
            {
                Assert.Fail($"'{text}' did not appear; the console's end:\n{Tail(all)}");
            }
        }
    }

    /// <summary>Console output, with Unix line ends.</summary>
    internal static string Read(string console)
    {
        if (!File.Exists(console)) return "";
        using var file = new FileStream(console, FileMode.Open, FileAccess.Read, FileShare.ReadWrite);
        return new StreamReader(file).ReadToEnd().Replace("\r", "", StringComparison.Ordinal);
    }

    internal static string Tail(string text) => text[^Math.Min(text.Length, 2500)..];

    /// <summary>The output around the first number that is missing from a sequence.</summary>
    internal static string Around(string all, string word, int[] found)
    {
        int missing = Enumerable.Range(0, found.Length + 1).First(i => i >= found.Length || found[i] != i);
        int at = Math.Max(0, all.IndexOf($"{word} {missing - 1} ", StringComparison.Ordinal) - 200);
        return all[at..Math.Min(all.Length, at + 800)];
    }

    /// <summary>One entry of cpio's "newc": eight hexadecimal digits a field, name and content padded to 4.</summary>
    private static void Entry(FileStream file, string name, int mode, byte[] content)
    {
        int[] fields = [0, mode, 0, 0, 1, 0, content.Length, 0, 0, 0, 0, name.Length + 1, 0];
        file.Write(Encoding.ASCII.GetBytes("070701" + string.Concat(fields.Select(static f => f.ToString("x8", System.Globalization.CultureInfo.InvariantCulture))) + name + "\0"));
        Pad();
        file.Write(content);
        Pad();

        void Pad() => file.Write(new byte[-file.Position & 3]);
    }

    /// <summary>
    /// Arguments of <c>vmm run</c> that boot it with the initrd of this name. Paused: connecting to a monitor while a guest keeps the lab's one slow
    /// processor busy takes longer than a client waits. Its kernel is silent: a message in the middle of a line would hide that.
    /// </summary>
    internal static string[] Boot(VmmCommands vmm, int cpus = 1) =>
        ["--paused", "--accel", "kvm", "--cpus", $"{cpus}", "--kernel", Kernel, "--initrd", vmm["initrd"], "--append", CommandLine + " loglevel=1"];
}
