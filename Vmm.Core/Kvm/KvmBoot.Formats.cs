using System.Buffers.Binary;
using static System.Buffers.Binary.BinaryPrimitives;

namespace Vmm.Core.Kvm;

// ELF (with the PVH entry if the file has a PVH note, else with its 64-bit entry) and Linux's 64-bit boot protocol.
internal sealed partial class KvmBoot
{
    private const uint PvhMagic = 0x336ec578, PvhNote = 18;
    private const int ElfHeaderBytes = 64, ProgramHeaderBytes = 56;

    /// <summary>RAM that the guest may use: below the EBDA, and from 1 MiB up.</summary>
    private (ulong Start, ulong Bytes, uint Type)[] MemoryMap =>
        [(0, EbdaAddress, 1), (EbdaAddress, FlatAddress - EbdaAddress, 2), .. _memory.Blocks.Select(static b => b.Address.Value == 0 ? (FlatAddress, b.SizeBytes - FlatAddress, 1u) : (b.Address.Value, b.SizeBytes, 1u))];

    private void ReadElf(byte[] image)
    {
        if (image.Length < ElfHeaderBytes) throw Bad("the ELF header is cut short");
        if (image[4] != 2 || image[5] != 1 || ReadUInt16LittleEndian(image.AsSpan(18)) != 62) throw Bad("expected a little-endian 64-bit ELF file for x86-64");
        _entry = ReadUInt64LittleEndian(image.AsSpan(24));
        ulong headers = ReadUInt64LittleEndian(image.AsSpan(32));
        int size = ReadUInt16LittleEndian(image.AsSpan(54)), count = ReadUInt16LittleEndian(image.AsSpan(56));
        if (size < ProgramHeaderBytes || headers > (ulong)image.Length || (ulong)count * (ulong)size > (ulong)image.Length - headers) throw Bad("the ELF program headers are outside the file");
        for (int i = 0; i < count; i++)
        {
            ReadOnlySpan<byte> header = image.AsSpan((int)headers + i * size, ProgramHeaderBytes);
            uint type = ReadUInt32LittleEndian(header);
            if (type is not (1 or 4)) continue;
            ulong offset = ReadUInt64LittleEndian(header[8..]), address = ReadUInt64LittleEndian(header[24..]), bytes = ReadUInt64LittleEndian(header[32..]);
            ulong memory = ReadUInt64LittleEndian(header[40..]);
            if (offset > (ulong)image.Length || bytes > (ulong)image.Length - offset || (type == 1 && memory < bytes)) throw Bad($"ELF segment {i} is outside the file");
            ReadOnlyMemory<byte> content = image.AsMemory((int)offset, (int)bytes);
            if (type == 1 && memory > 0) AddSegment(address, content, memory);
            else if (type == 4) FindPvh(content.Span);
        }
        if (_segments.Count == 0) throw Bad("the ELF file has no segment to load");
        if (!_segments.Exists(s => _entry >= s.Address && _entry < s.Address + s.Size)) throw Bad($"the entry 0x{_entry:x} is in no segment; a virtual address needs a PVH note with the physical one");
    }

    /// <summary>Finds the PVH entry. A note is u32 name length, u32 descriptor length, u32 type, then name and descriptor, each padded to 4 bytes.</summary>
    private void FindPvh(ReadOnlySpan<byte> notes)
    {
        while (notes.Length >= 12)
        {
            long name = (ReadUInt32LittleEndian(notes) + 3L) & ~3L, descriptor = ReadUInt32LittleEndian(notes[4..]), padded = (descriptor + 3) & ~3L;
            if (12 + name + padded > notes.Length) return;
            if (ReadUInt32LittleEndian(notes[8..]) == PvhNote && notes.Slice(12, (int)name).StartsWith("Xen\0"u8) && descriptor >= 4)
            {
                _entry = ReadUInt32LittleEndian(notes[(12 + (int)name)..]);
                _isPvh = true;
                return;
            }
            notes = notes[(int)(12 + name + padded)..];
        }
    }

    private void ReadLinux(byte[] image)
    {
        int version = ReadUInt16LittleEndian(image.AsSpan(0x206)), sectors = image[0x1f1] == 0 ? 4 : image[0x1f1];
        if (version < 0x20c || (ReadUInt16LittleEndian(image.AsSpan(0x236)) & 1) == 0) throw Bad($"boot protocol {version >> 8}.{version & 0xff:d2} has no 64-bit entry; expected 2.12 or later");
        int start = (sectors + 1) * 512;
        if (start >= image.Length) throw Bad($"the bzImage is cut short: its kernel would start at {start} of {image.Length} bytes");
        ulong preferred = ReadUInt64LittleEndian(image.AsSpan(0x258)), initSize = ReadUInt32LittleEndian(image.AsSpan(0x260));
        bool relocatable = image[0x234] != 0;
        ulong address = preferred >= FlatAddress && initSize < RamEnd && preferred <= RamEnd - initSize ? preferred
            : relocatable ? FlatAddress : throw Bad($"it needs {initSize} bytes at 0x{preferred:x}; RAM ends at 0x{RamEnd:x}");
        AddSegment(address, image.AsMemory(start), Math.Max(initSize, (ulong)(image.Length - start)));
        _entry = address + 0x200;
        uint commandLine = ReadUInt32LittleEndian(image.AsSpan(0x238));
        if ((uint)_options.CommandLine.Length > commandLine) throw Bad($"the command line has {_options.CommandLine.Length} bytes; this kernel takes {commandLine}");
        _initrdEnd = ReadUInt32LittleEndian(image.AsSpan(0x22c)) + 1UL;
        _bootParams = new byte[4096];
        int headerEnd = Math.Min(0x202 + image[0x201], 0x290);
        image.AsSpan(0x1f1, headerEnd - 0x1f1).CopyTo(_bootParams.AsSpan(0x1f1));
    }

    /// <summary>Writes Linux's <c>struct boot_params</c>: the completed header of the image, and the memory map.</summary>
    private void WriteBootParams()
    {
        byte[] zero = [.. _bootParams!];
        WriteUInt64LittleEndian(zero.AsSpan(0x70), AcpiAddress);
        WriteUInt16LittleEndian(zero.AsSpan(0x1fa), 0xffff);
        zero[0x210] = 0xff;
        WriteUInt32LittleEndian(zero.AsSpan(0x218), (uint)_initrdAddress);
        WriteUInt32LittleEndian(zero.AsSpan(0x21c), (uint)_initrd.Length);
        WriteUInt32LittleEndian(zero.AsSpan(0x228), (uint)CommandLineAddress);
        var map = MemoryMap;
        zero[0x1e8] = (byte)map.Length;
        for (int i = 0; i < map.Length; i++)
        {
            Span<byte> entry = zero.AsSpan(0x2d0 + i * 20);
            WriteUInt64LittleEndian(entry, map[i].Start);
            WriteUInt64LittleEndian(entry[8..], map[i].Bytes);
            WriteUInt32LittleEndian(entry[16..], map[i].Type);
        }
        _memory.Write(new Memory.GuestAddress(BootParamsAddress), zero);
    }

    /// <summary>Writes Xen's <c>struct hvm_start_info</c>, followed by its one module and its memory map.</summary>
    private void WriteStartInfo()
    {
        const int modules = 56, map = 96;
        var entries = MemoryMap;
        byte[] info = new byte[map + entries.Length * 24];
        WriteUInt32LittleEndian(info, PvhMagic);
        WriteUInt32LittleEndian(info.AsSpan(4), 1);
        if (_initrd.Length > 0)
        {
            WriteUInt32LittleEndian(info.AsSpan(12), 1);
            WriteUInt64LittleEndian(info.AsSpan(16), StartInfoAddress + modules);
            WriteUInt64LittleEndian(info.AsSpan(modules), _initrdAddress);
            WriteUInt64LittleEndian(info.AsSpan(modules + 8), (ulong)_initrd.Length);
        }
        WriteUInt64LittleEndian(info.AsSpan(24), CommandLineAddress);
        WriteUInt64LittleEndian(info.AsSpan(32), AcpiAddress);
        WriteUInt64LittleEndian(info.AsSpan(40), StartInfoAddress + map);
        WriteUInt32LittleEndian(info.AsSpan(48), (uint)entries.Length);
        for (int i = 0; i < entries.Length; i++)
        {
            Span<byte> entry = info.AsSpan(map + i * 24);
            WriteUInt64LittleEndian(entry, entries[i].Start);
            WriteUInt64LittleEndian(entry[8..], entries[i].Bytes);
            WriteUInt32LittleEndian(entry[16..], entries[i].Type);
        }
        _memory.Write(new Memory.GuestAddress(StartInfoAddress), info);
    }
}
