using System.Text;
using Vmm.Tests.Support;

namespace Vmm.Tests.Lab;

/// <summary>
/// Debian's kernel, which the lab itself runs, as the guest of a <c>vmm</c> in the lab. Its initramfs has busybox, modules, and a script as init.
/// </summary>
internal static class LinuxGuest
{
    internal const string Kernel = "/guest/vmlinuz";

    /// <summary>
    /// noxsave: the lab's processor is emulated, and the emulator does not intercept XSETBV for a hypervisor, so a guest with XSAVE would lose registers.
    /// </summary>
    internal const string CommandLine = "console=ttyS0 panic=-1 noxsave";

    private const string Prologue = """
        #!/bin/busybox sh
        /bin/busybox --install -s /bin; export PATH=/bin
        mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp

        """;

    /// <summary>Prints the kernel's warnings and errors between two marker lines. It is a program, so that each shell in the guest has it.</summary>
    private const string Warnings = "#!/bin/sh\necho WARNINGS; dmesg -r | grep -E '^<[0-4]>'; echo END\n";

    /// <summary>Writes an initramfs.</summary>
    /// <param name="path">The file to write.</param>
    /// <param name="script">The commands of the first process, which then powers off.</param>
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

    /// <summary>Waits until a file of console output contains a text.</summary>
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

    /// <summary>Reads console output with Unix line ends.</summary>
    internal static string Read(string console)
    {
        if (!File.Exists(console)) return "";
        using var file = new FileStream(console, FileMode.Open, FileAccess.Read, FileShare.ReadWrite);
        return new StreamReader(file).ReadToEnd().Replace("\r", "", StringComparison.Ordinal);
    }

    internal static string Tail(string text) => text[^Math.Min(text.Length, 2500)..];

    /// <summary>The output around the first number that a sequence lacks.</summary>
    internal static string Around(string all, string word, int[] found)
    {
        int missing = Enumerable.Range(0, found.Length + 1).First(i => i >= found.Length || found[i] != i);
        int at = Math.Max(0, all.IndexOf($"{word} {missing - 1} ", StringComparison.Ordinal) - 200);
        return all[at..Math.Min(all.Length, at + 800)];
    }

    /// <summary>Writes one entry of cpio's "newc" format: each field has eight hexadecimal digits; name and content are padded to 4 bytes.</summary>
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
    /// Arguments of <c>vmm run</c> that boot the guest with the file "initrd". <c>--paused</c>: a running guest takes the lab's only, slow processor, so
    /// that the monitor's client would time out. <c>loglevel=1</c>: a kernel message must not split a line that a test looks for.
    /// </summary>
    internal static string[] Boot(VmmCommands vmm, int cpus = 1) =>
        ["--paused", "--accel", "kvm", "--cpus", $"{cpus}", "--kernel", Kernel, "--initrd", vmm["initrd"], "--append", CommandLine + " loglevel=1"];
}
