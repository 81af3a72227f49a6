using System.Buffers.Binary;
using System.Text;
using Vmm.Core.Cpr;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Migration.Cpr;

/// <summary>
/// The CPR state's bytes (vfio-migration 7.2; QEMU: <c>vmstate_cpr_state</c>): u32 magic, u32 version 1; per descriptor u8 1, u32 length of the
/// name with its NUL, name, i32 id, descriptor; u8 0; then optionally the subsection of IOMMUFD devices. With cpr-transfer a descriptor is one byte
/// 0x20 that carries it as SCM_RIGHTS; with cpr-exec it is its number as u32.
/// </summary>
internal static class CprState
{
    internal const uint Magic = 0x51435052, Version = 1;
    internal const byte FdMark = 0x20;
    private const byte SubsectionMark = 5;
    private static readonly byte[] s_devices = "CprState/vfio devices"u8.ToArray();

    /// <summary>Bytes, and the descriptor that the last of them carries, or null.</summary>
    internal readonly record struct Part(byte[] Bytes, OwnedFd? Fd);

    /// <summary>Encodes the state as parts, each of which needs its own sendmsg. A VM here hands over no IOMMUFD devices, which only QEMU does.</summary>
    /// <exception cref="StreamLimitException">There are more descriptors or bytes than a reader accepts.</exception>
    internal static IReadOnlyList<Part> ToParts(IReadOnlyList<CprFd> fds, IReadOnlyList<CprIommufdDevice> devices)
    {
        var parts = new List<Part>();
        var bytes = new List<byte>();
        UInt32(bytes, Magic);
        UInt32(bytes, Version);
        foreach (CprFd fd in fds)
        {
            Record(bytes, fd);
            parts.Add(new Part([.. bytes], null));
            parts.Add(new Part([FdMark], fd.Fd));
            bytes.Clear();
        }
        Devices(bytes, devices);
        parts.Add(new Part([.. bytes], null));
        ThrowIfOver(fds.Count, parts.Sum(static p => (long)p.Bytes.Length));
        return parts;
    }

    /// <summary>Encodes the state for an exec, with descriptors by number.</summary>
    /// <exception cref="StreamLimitException">There are more descriptors or bytes than a reader accepts.</exception>
    internal static byte[] ToBytes(IReadOnlyList<CprFd> fds, IReadOnlyList<CprIommufdDevice> devices)
    {
        var bytes = new List<byte>();
        UInt32(bytes, Magic);
        UInt32(bytes, Version);
        foreach (CprFd fd in fds)
        {
            Record(bytes, fd);
            UInt32(bytes, (uint)fd.Fd.Number);
        }
        Devices(bytes, devices);
        ThrowIfOver(fds.Count, bytes.Count);
        return [.. bytes];
    }

    /// <summary>Parses a whole state of mode cpr-transfer or cpr-exec.</summary>
    /// <param name="bytes">The whole state.</param>
    /// <param name="mode">cpr-transfer or cpr-exec.</param>
    /// <param name="takeFd">With cpr-transfer returns the next received descriptor; with cpr-exec the descriptor of this number; null if there is none.</param>
    /// <returns>The content, which the caller owns.</returns>
    /// <exception cref="VmmException">The bytes are no state, or exceed a limit. The descriptors taken so far are closed.</exception>
    internal static CprIncoming Parse(ReadOnlySpan<byte> bytes, MigrationMode mode, Func<int, OwnedFd?> takeFd)
    {
        var fds = new List<CprFd>();
        try
        {
            var r = new WireReader(bytes);
            uint magic = Number(ref r, "magic"), version = Number(ref r, "version");
            if (magic != Magic) throw Bad("magic", 0, $"0x{Magic:x8}", $"0x{magic:x8}");
            if (version != Version) throw Bad("version", 4, $"{Version}", $"{version}");
            while (Follows(ref r, "descriptor list"))
            {
                if (fds.Count == WireLimits.CprFds) throw new StreamLimitException($"CPR state: more than {WireLimits.CprFds} descriptors (WireLimits.CprFds)");
                string name = Name(ref r);
                int id = (int)Number(ref r, "descriptor id");
                int at = r.Position;
                int number = mode == MigrationMode.CprExec ? (int)Number(ref r, "descriptor number") : One(ref r, "descriptor mark");
                if (mode != MigrationMode.CprExec && number != FdMark) throw Bad($"mark of descriptor '{name}'", at, $"0x{FdMark:x2}", $"0x{number:x2}");
                OwnedFd fd = takeFd(number) ?? throw Bad($"descriptor '{name}' {id}", at, "a descriptor", mode == MigrationMode.CprExec ? $"{number}, which is not open" : "none with these bytes");
                fds.Add(new CprFd(name, id, fd));
            }
            IReadOnlyList<CprIommufdDevice> devices = r.Remaining == 0 ? [] : ReadDevices(ref r);
            if (r.Remaining != 0) throw Bad("end", r.Position, "the end", $"{r.Remaining} more bytes");
            return new CprIncoming(mode, fds, devices);
        }
        catch
        {
            foreach (CprFd fd in fds) fd.Fd.Dispose();
            throw;
        }
    }

    private static List<CprIommufdDevice> ReadDevices(ref WireReader r)
    {
        int at = r.Position;
        byte mark = One(ref r, "subsection mark"), length = One(ref r, "subsection name");
        if (mark != SubsectionMark || r.TryReadBytes(length, out ReadOnlySpan<byte> name) != WireStatus.Ok || !name.SequenceEqual(s_devices))
            throw Bad("subsection", at, "'CprState/vfio devices'", $"mark {mark} with a name of {length} bytes");
        uint version = Number(ref r, "subsection version");
        if (version != 1) throw Bad("subsection version", r.Position - 4, "1", $"{version}");
        var devices = new List<CprIommufdDevice>();
        while (Follows(ref r, "device list"))
        {
            if (devices.Count == WireLimits.CprFds) throw new StreamLimitException($"CPR state: more than {WireLimits.CprFds} devices (WireLimits.CprFds)");
            devices.Add(new CprIommufdDevice(Name(ref r), (int)Number(ref r, "device id"), Number(ref r, "IOAS id"), Number(ref r, "page table id")));
        }
        return devices;
    }

    /// <summary>Checks the reader's limits before the hand-over: the VM can continue here, but not once an exec has replaced the process.</summary>
    private static void ThrowIfOver(int fds, long bytes)
    {
        if (fds > WireLimits.CprFds) throw new StreamLimitException($"CPR state: {fds} descriptors, at most {WireLimits.CprFds} can be handed over (WireLimits.CprFds)");
        if (bytes > WireLimits.CprStateBytes) throw new StreamLimitException($"CPR state: {bytes} bytes, at most {WireLimits.CprStateBytes} can be handed over (WireLimits.CprStateBytes)");
    }

    private static void Record(List<byte> bytes, CprFd fd)
    {
        bytes.Add(1);
        NameWithNul(bytes, fd.Name);
        UInt32(bytes, (uint)fd.Id);
    }

    private static void Devices(List<byte> bytes, IReadOnlyList<CprIommufdDevice> devices)
    {
        bytes.Add(0);
        bytes.Add(SubsectionMark);
        bytes.Add((byte)s_devices.Length);
        bytes.AddRange(s_devices);
        UInt32(bytes, 1);
        foreach (CprIommufdDevice device in devices)
        {
            bytes.Add(1);
            NameWithNul(bytes, device.Name);
            UInt32(bytes, (uint)device.DevId);
            UInt32(bytes, device.IoasId);
            UInt32(bytes, device.HwptId);
        }
        bytes.Add(0);
    }

    private static void NameWithNul(List<byte> bytes, string name)
    {
        UInt32(bytes, (uint)name.Length + 1);
        bytes.AddRange(Encoding.Latin1.GetBytes(name));
        bytes.Add(0);
    }

    private static void UInt32(List<byte> bytes, uint value)
    {
        Span<byte> b = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32BigEndian(b, value);
        bytes.AddRange(b);
    }

    private static bool Follows(ref WireReader r, string what)
    {
        int at = r.Position;
        byte mark = One(ref r, what);
        return mark switch { 1 => true, 0 => false, _ => throw Bad($"mark in the {what}", at, "0 or 1", $"{mark}") };
    }

    private static string Name(ref WireReader r)
    {
        uint length = Number(ref r, "name length");
        if (length is < 2 or > WireLimits.CprNameBytes) throw Bad("name length", r.Position - 4, $"2 to {WireLimits.CprNameBytes}", $"{length}");
        int at = r.Position;
        if (r.TryReadBytes((int)length, out ReadOnlySpan<byte> name) != WireStatus.Ok) throw Truncated("name", r.Position);
        int end = name.IndexOf((byte)0);
        return end == name.Length - 1 ? Encoding.Latin1.GetString(name[..end]) : throw Bad("name", at, "a NUL at its end", end < 0 ? "none" : $"one at {end} of {length}");
    }

    private static uint Number(ref WireReader r, string what) => r.TryReadUInt32(out uint value) == WireStatus.Ok ? value : throw Truncated(what, r.Position);

    private static byte One(ref WireReader r, string what) => r.TryReadByte(out byte value) == WireStatus.Ok ? value : throw Truncated(what, r.Position);

    private static StreamTruncatedException Truncated(string what, int at) => new($"CPR state ends in its {what}, offset {at}") { Offset = at };

    private static StreamFormatException Bad(string what, int at, string expected, string found) =>
        new($"CPR state, offset {at}: {what}: expected {expected}, found {found}") { Section = "CprState", Offset = at, Expected = expected, Found = found };
}
