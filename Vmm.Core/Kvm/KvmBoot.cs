using System.Buffers.Binary;
using System.Text;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>
/// The program that a guest starts with. It is read and checked once, and copied into RAM at every reset. A flat binary goes to 1 MiB and starts at its
/// first byte in 64-bit mode, with RAM and the first 4 GiB identity-mapped (at most 21 GiB) and the stack below 512 KiB. The other formats follow
/// their own specifications.
/// </summary>
internal sealed partial class KvmBoot
{
    internal const ulong FlatAddress = 1 << 20, StackTop = 0x80000;
    private const ulong GdtAddress = 0x500, StartInfoAddress = 0x6000, BootParamsAddress = 0x7000, PageTables = 0x9000, CommandLineAddress = 0x20000, EbdaAddress = 0x9fc00;
    private const uint AcpiAddress = 0xe0000;
    private const int MaxCommandLine = 2047;
    private const long MaxFileBytes = 1 << 30;

    private readonly GuestMemory _memory;
    private readonly KernelOptions _options;
    private readonly int _cpus;
    private readonly List<(ulong Address, ReadOnlyMemory<byte> Bytes, ulong Size)> _segments = [];
    private ulong _entry;
    private byte[]? _bootParams;
    private bool _isPvh;
    private ulong _initrdAddress, _initrdEnd = ulong.MaxValue;
    private byte[] _initrd = [];

    private KvmBoot(KernelOptions options, GuestMemory memory, int cpus) => (_options, _memory, _cpus) = (options, memory, cpus);

    private ulong RamEnd => _memory.Blocks[0].Range.End;

    /// <summary>Reads and checks the files.</summary>
    /// <exception cref="ConfigurationException">A file cannot be read, is malformed, or does not fit into RAM.</exception>
    internal static KvmBoot Read(KernelOptions options, GuestMemory memory, int cpus)
    {
        var boot = new KvmBoot(options, memory, cpus);
        if (memory.Blocks.Count == 0 || memory.Blocks[0].Address.Value != 0) throw boot.Bad("the guest has no RAM at address 0");
        if (memory.Blocks.FirstOrDefault(static b => b.Address.Value < GuestMemory.AfterDevices && b.Range.End > GuestMemory.DevicesAddress) is { } over)
            throw boot.Bad($"RAM block '{over.Name}' ends above 0x{GuestMemory.DevicesAddress:x}, where devices begin; give the guest at most 3 GiB in its first block, the rest in others, which go above");
        if (boot.RamEnd < 2 << 20) throw boot.Bad("the guest needs at least 2 MiB of RAM");
        if (Encoding.ASCII.GetByteCount(options.CommandLine) > MaxCommandLine) throw boot.Bad($"the command line is longer than {MaxCommandLine} bytes");
        byte[] image = options.Image?.ToArray() ?? ReadFile(options.KernelPath);
        if (options.InitrdPath is { } initrd) boot._initrd = ReadFile(initrd);
        if (image.AsSpan().StartsWith("\u007fELF"u8)) boot.ReadElf(image);
        else if (image.Length > 0x264 && image.AsSpan(0x202, 4).SequenceEqual("HdrS"u8)) boot.ReadLinux(image);
        else
        {
            if (image.Length == 0) throw boot.Bad("the file is empty");
            boot.AddSegment(FlatAddress, image, (ulong)image.Length);
            boot._entry = FlatAddress;
        }
        if (boot._initrd.Length > 0)
        {
            ulong end = Math.Min(boot.RamEnd, boot._initrdEnd);
            boot._initrdAddress = (end - (ulong)boot._initrd.Length) & ~0xfffUL;
            if ((ulong)boot._initrd.Length > end || boot._segments.Exists(s => s.Address + s.Size > boot._initrdAddress))
                throw boot.Bad($"kernel and initrd ({boot._initrd.Length} bytes) do not fit below 0x{end:x}");
        }
        return boot;
    }

    /// <summary>Address of the program's first instruction.</summary>
    internal ulong Entry => _entry;

    /// <summary>Address of the initial RAM disk; 0 if there is none.</summary>
    internal ulong InitrdAddress => _initrdAddress;

    /// <summary>Copies everything into RAM and sets the first vCPU to the entry; the other vCPUs wait for it. BQL: held, vCPUs parked.</summary>
    internal void Load(KvmVcpu vcpu)
    {
        foreach ((ulong address, ReadOnlyMemory<byte> bytes, ulong size) in _segments)
        {
            _memory.Write(new GuestAddress(address), bytes.Span);
            if (size > (ulong)bytes.Length) _memory.Write(new GuestAddress(address + (ulong)bytes.Length), new byte[size - (ulong)bytes.Length]);
        }
        if (_initrd.Length > 0) _memory.Write(new GuestAddress(_initrdAddress), _initrd);
        _memory.Write(new GuestAddress(CommandLineAddress), [.. Encoding.ASCII.GetBytes(_options.CommandLine), 0]);
        _memory.Write(new GuestAddress(AcpiAddress), AcpiTables.Build(AcpiAddress, _cpus));
        WriteGdtAndPageTables();
        if (_bootParams is not null) WriteBootParams();
        if (_isPvh) WriteStartInfo();
        SetUp(vcpu);
    }

    private void WriteGdtAndPageTables()
    {
        // Null, null, code, data: Linux's 64-bit protocol wants selectors 0x10 and 0x18.
        Words(GdtAddress, 0, 0, _isPvh ? 0x00cf9b000000ffffUL : 0x00af9b000000ffff, 0x00cf93000000ffff);
        if (_isPvh) return;
        Words(PageTables, PageTables + 0x1000 | 3);
        const int most = (int)((CommandLineAddress - PageTables - 0x2000) / 0x1000);
        int count = (int)Math.Clamp((_memory.Blocks.Max(static b => b.Range.End) + (1 << 30) - 1) >> 30, 4, most);
        ulong[] directories = [.. Enumerable.Range(0, count).Select(static i => PageTables + 0x2000 + 0x1000 * (ulong)i | 3)];
        Words(PageTables + 0x1000, directories);
        Words(PageTables + 0x2000, [.. Enumerable.Range(0, count * 512).Select(static i => ((ulong)i << 21) | 0x83)]);
    }

    private void SetUp(KvmVcpu vcpu)
    {
        Sregs s = vcpu.GetSregs();
        var code = new Segment { Selector = 0x10, Limit = uint.MaxValue, Type = 0xb, Present = 1, S = 1, G = 1, L = _isPvh ? (byte)0 : (byte)1, Db = _isPvh ? (byte)1 : (byte)0 };
        var data = new Segment { Selector = 0x18, Limit = uint.MaxValue, Type = 3, Present = 1, S = 1, G = 1, Db = 1 };
        (s.Cs, s.Ds, s.Es, s.Ss, s.Fs, s.Gs) = (code, data, data, data, data, data);
        s.Tr = new Segment { Limit = 0x67, Type = 0xb, Present = 1 };
        s.Gdt = new Dtable { Base = GdtAddress, Limit = 31 };
        s.Idt = new Dtable();
        const ulong protectedMode = 1, extensionType = 0x10, paging = 1UL << 31, physicalAddressExtension = 1 << 5, longMode = 0x500;
        s.Cr0 = protectedMode | extensionType;
        if (!_isPvh)
        {
            s.Cr0 |= paging;
            s.Cr3 = PageTables;
            s.Cr4 = physicalAddressExtension;
            s.Efer = longMode;
        }
        vcpu.SetSregs(s);
        vcpu.SetRegs(new Regs { Rip = _entry, Rflags = 2, Rsp = StackTop, Rsi = BootParamsAddress, Rbx = _isPvh ? StartInfoAddress : 0 });
    }

    private void Words(ulong address, params ulong[] words)
    {
        byte[] bytes = new byte[words.Length * 8];
        for (int i = 0; i < words.Length; i++) BinaryPrimitives.WriteUInt64LittleEndian(bytes.AsSpan(i * 8), words[i]);
        _memory.Write(new GuestAddress(address), bytes);
    }

    private void AddSegment(ulong address, ReadOnlyMemory<byte> bytes, ulong size)
    {
        if (address < FlatAddress || size > RamEnd || address > RamEnd - size)
            throw Bad($"a segment of {size} bytes at 0x{address:x} is not in RAM between 0x{FlatAddress:x} and 0x{RamEnd:x}");
        _segments.Add((address, bytes, size));
    }

    private static byte[] ReadFile(string path)
    {
        try
        {
            var info = new FileInfo(path);
            if (info.Length > MaxFileBytes) throw new ConfigurationException($"'{path}' has {info.Length} bytes; expected at most {MaxFileBytes}");
            return File.ReadAllBytes(path);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new ConfigurationException($"cannot read '{path}': {e.Message}", e);
        }
    }

    private ConfigurationException Bad(string what) => new($"kernel '{_options.KernelPath}': {what}");
}
