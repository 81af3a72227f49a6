using System.Text;
using Iced.Intel;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Kvm;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Guests;
using static Iced.Intel.AssemblerRegisters;
using static System.Buffers.Binary.BinaryPrimitives;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>The VMM says what is wrong with a kernel before a guest runs, and starts ELF files with and without PVH at the entry that they name.</summary>
[TestFixture]
internal sealed class KvmBootTests
{
    private const ulong Address = 2 << 20;

    private static IEnumerable<TestCaseData> Malformed()
    {
        yield return Case("empty", [], "the file is empty");
        yield return Case("elf-cut", Elf([1])[..40], "header is cut short");
        yield return Case("elf-32", With(Elf([1]), 4, 1), "64-bit ELF");
        yield return Case("elf-arm", With(Elf([1]), 18, 183), "for x86-64");
        yield return Case("elf-headers-outside", With(Elf([1]), 33, 0xff), "program headers are outside");
        yield return Case("elf-no-segment", With(Elf([1]), 64, 2), "no segment to load");
        yield return Case("elf-content-outside", With(Elf([1]), 64 + 8 + 2, 1), "segment 0 is outside the file");
        yield return Case("elf-content-beyond-memory", With(Elf([1, 2, 3]), 64 + 40, 1), "segment 0 is outside the file");
        yield return Case("elf-address-outside", With(Elf([1]), 64 + 24 + 4, 1), "not in RAM");
        yield return Case("elf-below", With(Elf([1]), 64 + 24 + 2, 0), "not in RAM");
        yield return Case("elf-too-big", With(Elf([1]), 64 + 40 + 4, 1), "not in RAM");
        yield return Case("elf-entry-nowhere", With(Elf([1]), 24, 0x77), "is in no segment");
        yield return Case("linux-old", Linux(version: 0x20b), "boot protocol 2.11 has no 64-bit entry");
        yield return Case("linux-no-64-bit", Linux(flags: 0), "has no 64-bit entry");
        yield return Case("linux-cut", Linux()[..0x3ff], "cut short");
        yield return Case("linux-fixed-and-too-big", Linux(initBytes: 64 << 20, relocatable: false), "it needs 67108864 bytes");
        yield return Case("linux-too-big", Linux(initBytes: 64 << 20), "not in RAM");
        yield return Case("flat-too-big", Enumerable.Repeat((byte)1, 8 << 20).ToArray(), "not in RAM");

        static TestCaseData Case(string name, byte[] image, string message) => new TestCaseData(image, message).SetArgDisplayNames(name);
    }

    [TestCaseSource(nameof(Malformed))]
    public void AMalformedKernelIsRefusedBeforeTheGuestRuns(byte[] image, string message) =>
        Assert.That(() => Read(image), Throws.TypeOf<ConfigurationException>().With.Message.Contains(message).And.Message.Contains("'guest'"));

    [Test]
    public void EveryPrefixOfAKernelIsTakenOrRefusedWithAClearError([Values] bool linux)
    {
        byte[] image = linux ? Linux() : Elf([1, 2, 3]);
        for (int length = 0; length < image.Length; length++)
        {
            try
            {
                Read(image[..length]);
            }
            catch (ConfigurationException)
            {
                // The only exception that a malformed kernel may cause.
            }
        }
    }

    [TestCase(1UL << 20, "at least 2 MiB")]
    [TestCase(4UL << 30, "at most 3 GiB")]
    public void ImpossibleMemorySizesAreRefused(ulong bytes, string message) =>
        Assert.That(() => Read([1], memoryBytes: bytes), Throws.TypeOf<ConfigurationException>().With.Message.Contains(message));

    [Test]
    public void ACommandLineThatTheKernelCannotHoldIsRefused()
    {
        Assert.That(() => Read(Linux(commandLineBytes: 10), commandLine: new string('x', 11)), Throws.TypeOf<ConfigurationException>().With.Message.Contains("takes 10"));
        Assert.That(() => Read([1], commandLine: new string('x', 3000)), Throws.TypeOf<ConfigurationException>().With.Message.Contains("longer than"));
    }

    [Test]
    public void AnInitrdGoesBelowTheKernelsLimitAndNeverOverTheKernel()
    {
        using var folder = new TempDirectory();
        File.WriteAllBytes(folder["initrd"], new byte[5000]);
        Assert.That(Read(Linux(initrdMax: 0x3fffff), folder["initrd"]).InitrdAddress, Is.EqualTo(0x400000UL - 0x2000));
        File.WriteAllBytes(folder["initrd"], new byte[6 << 20]);
        Assert.That(() => Read(Linux(initBytes: 4 << 20), folder["initrd"]), Throws.TypeOf<ConfigurationException>().With.Message.Contains("do not fit"));
        Assert.That(() => Read(Linux(), folder["missing"]), Throws.TypeOf<ConfigurationException>().With.Message.Contains("cannot read"));
    }

    [Test]
    public void AnElfFileStartsAtItsEntryIn64BitMode() => Assert.That(ExitCode(Elf(KvmGuest.Code(static a =>
    {
        a.mov(rax, 0x1122334455667788);
        a.shr(rax, 56);
        a.mov(edx, (int)LegacyDevices.DebugExitPort);
        a.@out(dx, al);
        a.hlt();
    }))), Is.EqualTo(0x11));

    [Test]
    public void AnElfFileWithThePvhNoteStartsThereIn32BitModeWithItsStartInfo()
    {
        var a = new Assembler(32);
        a.mov(eax, __[ebx]); // hvm_start_info.magic
        a.mov(edx, (int)LegacyDevices.DebugExitPort);
        a.@out(dx, eax);
        a.hlt();
        Assert.That(ExitCode(Elf(GuestImage.Assemble(a, Address + 0x100), pvh: true)), Is.EqualTo(0x336ec578));
    }

    [Test]
    public void AcpiTablesHaveTheirLengthsAndSums([Values(1, 2, 64)] int cpus)
    {
        const uint at = 0xe0000;
        byte[] all = AcpiTables.Build(at, cpus);
        Assert.That(Sum(all.AsSpan(0, 20)), Is.Zero);
        Assert.That(Sum(all.AsSpan(0, 36)), Is.Zero);
        ReadOnlySpan<byte> xsdt = TableAt(all, ReadUInt64LittleEndian(all.AsSpan(24)) - at, "XSDT"), fadt = TableAt(all, ReadUInt64LittleEndian(xsdt[36..]) - at, "FACP");
        ReadOnlySpan<byte> madt = TableAt(all, ReadUInt64LittleEndian(xsdt[44..]) - at, "APIC");
        TableAt(all, ReadUInt64LittleEndian(fadt[140..]) - at, "DSDT");
        int processors = 0;
        for (int i = 44; i < madt.Length; i += madt[i + 1]) processors += madt[i] == 0 ? 1 : 0;
        Assert.That((processors, all.Length), Is.EqualTo((cpus, all.Length)));
        Assert.That(all, Has.Length.LessThan(0x20000));

        static byte Sum(ReadOnlySpan<byte> bytes)
        {
            byte sum = 0;
            foreach (byte b in bytes) sum += b;
            return sum;
        }

        static ReadOnlySpan<byte> TableAt(byte[] all, ulong offset, string signature)
        {
            ReadOnlySpan<byte> table = all.AsSpan((int)offset, ReadInt32LittleEndian(all.AsSpan((int)offset + 4)));
            Assert.That(Encoding.ASCII.GetString(table[..4]), Is.EqualTo(signature));
            Assert.That(Sum(table), Is.Zero, signature);
            return table;
        }
    }

    private static KvmBoot Read(byte[] image, string? initrd = null, string commandLine = "", ulong memoryBytes = 8 << 20)
    {
        using var memory = new GuestMemory();
        memory.AddBlock(new RamBlockOptions { Name = "ram", SizeBytes = memoryBytes });
        return KvmBoot.Read(new KernelOptions { KernelPath = "guest", Image = image, InitrdPath = initrd, CommandLine = commandLine }, memory, 1);
    }

    private static int? ExitCode(byte[] image)
    {
        using var guest = new KvmGuest(image, 8 << 20);
        Assert.That(guest.RunToEnd(), Is.EqualTo(RunState.Shutdown));
        return guest.Vm.Requests.ExitCode;
    }

    /// <summary>
    /// An ELF file with one segment at <see cref="Address"/>, whose start is the entry. With PVH, code and entry lie 256 bytes further, and the ELF entry
    /// is useless.
    /// </summary>
    private static byte[] Elf(byte[] code, bool pvh = false)
    {
        const int at = 64 + 2 * 56 + 32;
        byte[] segment = pvh ? [.. new byte[0x100], .. code] : code, image = new byte[at + segment.Length];
        "\u007fELF"u8.CopyTo(image);
        (image[4], image[5], image[6]) = (2, 1, 1);
        WriteUInt16LittleEndian(image.AsSpan(16), 2);
        WriteUInt16LittleEndian(image.AsSpan(18), 62);
        WriteUInt64LittleEndian(image.AsSpan(24), Address);
        WriteUInt64LittleEndian(image.AsSpan(32), 64);
        WriteUInt16LittleEndian(image.AsSpan(54), 56);
        WriteUInt16LittleEndian(image.AsSpan(56), (ushort)(pvh ? 2 : 1));
        Header(image.AsSpan(64), 1, at, Address, segment.Length);
        if (pvh)
        {
            Header(image.AsSpan(64 + 56), 4, at - 32, 0, 20);
            Span<byte> note = image.AsSpan(at - 32);
            (note[0], note[4], note[8]) = (4, 4, 18);
            "Xen\0"u8.CopyTo(note[12..]);
            WriteUInt32LittleEndian(note[16..], (uint)Address + 0x100);
        }
        segment.CopyTo(image, at);
        return image;

        static void Header(Span<byte> header, uint type, int offset, ulong address, int bytes)
        {
            WriteUInt32LittleEndian(header, type);
            WriteUInt64LittleEndian(header[8..], (ulong)offset);
            WriteUInt64LittleEndian(header[24..], address);
            WriteUInt64LittleEndian(header[32..], (ulong)bytes);
            WriteUInt64LittleEndian(header[40..], (ulong)bytes);
        }
    }

    /// <summary>A bzImage with one sector of setup code and one sector of kernel.</summary>
    private static byte[] Linux(ushort version = 0x20f, ushort flags = 1, uint initBytes = 1 << 20, bool relocatable = true, uint commandLineBytes = 2047, uint initrdMax = 0x7fffffff)
    {
        byte[] image = new byte[3 * 512];
        image[0x1f1] = 1;
        image[0x201] = 0x6a;
        "HdrS"u8.CopyTo(image.AsSpan(0x202));
        WriteUInt16LittleEndian(image.AsSpan(0x206), version);
        WriteUInt32LittleEndian(image.AsSpan(0x22c), initrdMax);
        image[0x234] = relocatable ? (byte)1 : (byte)0;
        WriteUInt16LittleEndian(image.AsSpan(0x236), flags);
        WriteUInt32LittleEndian(image.AsSpan(0x238), commandLineBytes);
        WriteUInt64LittleEndian(image.AsSpan(0x258), Address);
        WriteUInt32LittleEndian(image.AsSpan(0x260), initBytes);
        return image;
    }

    private static byte[] With(byte[] image, int at, byte value)
    {
        image[at] = value;
        return image;
    }
}
