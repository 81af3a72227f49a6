using System.Globalization;
using System.Reflection;
using System.Text;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Tests.Fakes;

/// <summary>
/// A scripted kernel with VFIO devices: it models containers, groups, iommufd and devices as far as the open flow uses them, records every
/// call, and fails those that a test names. Its descriptors are real, so that a test finds those that nobody closed; the receiver owns each.
/// </summary>
internal sealed partial class FakeVfioKernel : IVfioKernel
{
    private readonly Dictionary<int, Node> _nodes = [];
    private readonly List<(int Number, (ulong Device, ulong Inode) File)> _handed = [];

    /// <summary>The prefix that <see cref="Calls"/> leaves out of paths.</summary>
    internal string Root { get; set; } = "/dev/";

    internal List<FakeKernelDevice> Devices { get; } = [];

    /// <summary>Every call, in order: <c>open vfio/7</c>, <c>group 7: SET_CONTAINER</c>.</summary>
    internal List<string> Calls { get; } = [];

    /// <summary>Calls that always fail, by their name in <see cref="Calls"/> or by the part of it behind the colon.</summary>
    internal Dictionary<string, Errno> Failures { get; } = [];

    /// <summary>Calls that fail the next time only.</summary>
    internal Dictionary<string, Errno> FailOnce { get; } = [];

    /// <summary>Calls that succeed once, then fail once.</summary>
    internal Dictionary<string, Errno> FailOnSecond { get; } = [];

    internal int ApiVersion { get; set; }

    internal HashSet<uint> Extensions { get; } = [VfioUapi.VFIO_TYPE1v2_IOMMU, VfioUapi.VFIO_UNMAP_ALL];

    internal bool IsViable { get; set; } = true;

    /// <summary>The device number that every character device reports.</summary>
    internal string CdevNumber { get; set; } = "511:0";

    /// <summary>Count of the descriptors that this kernel gave out and that are still open.</summary>
    internal int OpenCount => _handed.Count(static f => IsOpen(f.Number, f.File));

    /// <summary>Content of regions, by file offset: reads return it, writes replace it.</summary>
    internal Dictionary<long, byte[]> Memory { get; } = [];

    internal List<(bool IsWrite, long Offset, int Length)> Accesses { get; } = [];

    /// <summary>The results of the next reads of a data descriptor.</summary>
    internal Queue<(byte[] Data, Errno Errno)> Data { get; } = [];

    internal List<byte[]> Written { get; } = [];

    /// <summary>Duplicates a descriptor, as SCM_RIGHTS does for another process: a new number for the same open file.</summary>
    internal OwnedFd Pass(OwnedFd fd)
    {
        OwnedFd passed = Posix.Duplicate(fd);
        _nodes[passed.Number] = _nodes[fd.Number];
        return passed;
    }

    public OwnedFd? Open(string path, out Errno errno)
    {
        string name = path.StartsWith(Root, StringComparison.Ordinal) ? path[Root.Length..] : path;
        Node? node = name switch
        {
            "vfio/vfio" => new Node(Kind.Container, "container"),
            "iommu" => new Node(Kind.Iommufd, "iommufd"),
            _ when name.StartsWith("vfio/devices/", StringComparison.Ordinal) && Devices.Find(d => name.EndsWith($"/{d.Cdev}", StringComparison.Ordinal)) is { } d =>
                new Node(Kind.Device, "device") { Device = d },
            _ when name.StartsWith("vfio/", StringComparison.Ordinal) && Devices.Exists(d => name == $"vfio/{d.Group}") => new Node(Kind.Group, $"group {name[5..]}"),
            _ => null,
        };
        if (Refused($"open {name}", out errno)) return null;
        if (node is null)
        {
            errno = Errno.ENOENT;
            return null;
        }
        return Hand(node);
    }

    public Errno DeviceNumber(OwnedFd fd, out string number)
    {
        number = CdevNumber;
        return Errno.None;
    }

    public int Ioctl(OwnedFd fd, uint request, nint value, out Errno errno)
    {
        Node node = _nodes[fd.Number];
        if (Refused($"{node.Name}: {RequestName(node, request)}", out errno)) return -1;
        switch (node.Kind, request)
        {
            case (Kind.Container, VfioUapi.VFIO_GET_API_VERSION): return ApiVersion;
            case (Kind.Container, VfioUapi.VFIO_CHECK_EXTENSION): return Extensions.Contains((uint)value) ? 1 : 0;
            case (Kind.Container, VfioUapi.VFIO_SET_IOMMU):
                node.HasIommu = true;
                return 0;
            case (Kind.Group, VfioUapi.VFIO_GROUP_UNSET_CONTAINER):
                node.Container = null;
                return 0;
            case (Kind.Device, VfioUapi.VFIO_DEVICE_RESET):
                if (!node.Device!.ResetWorks) return Fail(Errno.EINVAL, out errno);
                if (node.Device.MigState is not null) node.Device.MigState = (uint)VfioDeviceState.Running;
                return 0;
            default: return Fail(Errno.ENOTTY, out errno);
        }
    }

    public int Ioctl(OwnedFd fd, uint request, Span<byte> argument, out Errno errno) => Structure(fd, request, argument, [], out errno);

    public int Ioctl(OwnedFd fd, uint request, Span<byte> argument, int pointerOffset, Span<byte> pointee, out Errno errno)
    {
        argument.Slice(pointerOffset, 8).Fill(0xee);
        return Structure(fd, request, argument, pointee, out errno);
    }

    public int Read(OwnedFd fd, Span<byte> into, out Errno errno)
    {
        (byte[] data, errno) = Data.Dequeue();
        if (errno != Errno.None) return -1;
        data.CopyTo(into);
        return data.Length;
    }

    public int Write(OwnedFd fd, ReadOnlySpan<byte> from, out Errno errno)
    {
        errno = Errno.None;
        Written.Add(from.ToArray());
        return from.Length;
    }

    public int PRead(OwnedFd fd, Span<byte> into, long offset, out Errno errno)
    {
        Accesses.Add((false, offset, into.Length));
        if (Refused("pread", out errno)) return -1;
        if (!Memory.TryGetValue(offset, out byte[]? bytes)) return into.Length;
        bytes.CopyTo(into);
        return bytes.Length;
    }

    public int PWrite(OwnedFd fd, ReadOnlySpan<byte> from, long offset, out Errno errno)
    {
        Accesses.Add((true, offset, from.Length));
        Memory[offset] = from.ToArray();
        return Refused("pwrite", out errno) ? -1 : from.Length;
    }

    public MappedRegion Map(OwnedFd fd, ulong lengthBytes, long offset, string name, bool writable)
    {
        if (Refused($"mmap {offset:x}+{lengthBytes:x} {(writable ? "rw" : "r")}", out Errno errno)) throw new ChannelException(name, errno);
        using OwnedFd memory = Posix.MemFd("fake-region");
        Posix.Truncate(memory, (long)lengthBytes);
        return MappedRegion.Map(memory, lengthBytes, shared: true, 0, name, writable);
    }

    private static int Fail(Errno which, out Errno errno)
    {
        errno = which;
        return -1;
    }

    /// <summary>Whether a descriptor number still refers to the same file; after a close the number may be in use for another file.</summary>
    private static bool IsOpen(int number, (ulong Device, ulong Inode) file)
    {
        using var fd = new OwnedFd(number, ownsFd: false);
        return Posix.Stat(fd, out FileStatus stat) == Errno.None && (stat.Device, stat.Inode) == file;
    }

    /// <summary>The C name of an ioctl without its prefix; the kind of node decides, because nodes share ioctl numbers.</summary>
    private static string RequestName(Node node, uint request)
    {
        Type holder = node.Kind == Kind.Iommufd ? typeof(IommufdUapi) : typeof(VfioUapi);
        string[] prefixes = node.Kind switch
        {
            Kind.Iommufd => ["IOMMU_"],
            Kind.Group => ["VFIO_GROUP_"],
            Kind.Device => ["VFIO_DEVICE_"],
            Kind.Data => ["VFIO_MIG_"],
            _ => ["VFIO_IOMMU_", "VFIO_"],
        };
        foreach (string prefix in prefixes)
            foreach (FieldInfo field in holder.GetFields(BindingFlags.Static | BindingFlags.NonPublic))
                if (field.IsLiteral && field.Name.StartsWith(prefix, StringComparison.Ordinal) && Convert.ToUInt64(field.GetRawConstantValue(), CultureInfo.InvariantCulture) == request)
                    return field.Name[prefix.Length..];
        return $"{request:x}";
    }

    private int Structure(OwnedFd fd, uint request, Span<byte> argument, Span<byte> pointee, out Errno errno)
    {
        Node node = _nodes[fd.Number];
        if (Refused($"{node.Name}: {RequestName(node, request)}", out errno)) return -1;
        switch (node.Kind)
        {
            case Kind.Container: return Container(node, request, argument, pointee, out errno);
            case Kind.Iommufd: return Iommufd(request, argument, pointee, out errno);
            case Kind.Group: return Group(node, request, argument, out errno);
            case Kind.Data: return PrecopyInfo(argument, out errno);
            default: return Device(node, request, argument, pointee, out errno);
        }
    }

    private int Device(Node node, uint request, Span<byte> argument, Span<byte> pointee, out Errno errno)
    {
        errno = Errno.None;
        switch (request)
        {
            case VfioUapi.VFIO_DEVICE_SET_IRQS:
                node.Device!.IrqSets.Add(argument.ToArray());
                return node.Device.IrqResult;
            case VfioUapi.VFIO_DEVICE_FEATURE:
                errno = node.Device!.Feature(argument, pointee, () => HandNumber(new Node(Kind.Data, "data")));
                break;
            case VfioUapi.VFIO_DEVICE_BIND_IOMMUFD:
                var bind = Core.Interop.Ioctl.Read<VfioUapi.DeviceBindIommufd>(argument);
                if (bind.Argsz != 16 || _nodes.GetValueOrDefault(bind.Iommufd)?.Kind != Kind.Iommufd) return Fail(Errno.EBADF, out errno);
                bind.OutDevid = (uint)(1 + Devices.IndexOf(node.Device!));
                Core.Interop.Ioctl.AsBytes(ref bind).CopyTo(argument);
                break;
            case VfioUapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT:
                uint id = Core.Interop.Ioctl.Read<VfioUapi.DeviceAttachIommufdPt>(argument).PtId;
                Calls[^1] += $" {id}";
                if (Refused(Calls[^1], out errno, log: false)) return -1;
                break;
            case VfioUapi.VFIO_DEVICE_DETACH_IOMMUFD_PT: break;
            default:
                errno = node.Device!.GetInfo(request, argument);
                break;
        }
        return errno == Errno.None ? 0 : -1;
    }

    private int Group(Node node, uint request, Span<byte> argument, out Errno errno)
    {
        errno = Errno.None;
        switch (request)
        {
            case VfioUapi.VFIO_GROUP_GET_STATUS:
                argument[4] = (byte)(IsViable ? VfioUapi.VFIO_GROUP_FLAGS_VIABLE : 0);
                return 0;
            case VfioUapi.VFIO_GROUP_SET_CONTAINER:
                node.Container = _nodes[ReadInt(argument)];
                return 0;
            default:
                string name = Encoding.UTF8.GetString(argument[..argument.IndexOf((byte)0)]);
                if (node.Container?.HasIommu != true) return Fail(Errno.EINVAL, out errno);
                FakeKernelDevice? device = Devices.Find(d => d.Name == name && node.Name == $"group {d.Group}");
                return device is null ? Fail(Errno.ENODEV, out errno) : HandNumber(new Node(Kind.Device, "device") { Device = device });
        }
    }

    private static int ReadInt(ReadOnlySpan<byte> bytes) => BitConverter.ToInt32(bytes);

    private static int PrecopyInfo(Span<byte> argument, out Errno errno)
    {
        errno = Errno.None;
        var info = new VfioUapi.PrecopyInfo { Argsz = 24, Flags = 0xffffffff, InitialBytes = 24, DirtyBytes = 5 };
        Core.Interop.Ioctl.AsBytes(ref info).CopyTo(argument);
        return 0;
    }

    private bool Refused(string call, out Errno errno, bool log = true)
    {
        if (log) Calls.Add(call);
        if (FailOnce.Remove(call, out errno)) return true;
        if (FailOnSecond.Remove(call, out Errno later)) FailOnce[call] = later;
        int colon = call.IndexOf(": ", StringComparison.Ordinal);
        return Failures.TryGetValue(call, out errno) || (colon > 0 && Failures.TryGetValue(call[(colon + 2)..], out errno));
    }

    private OwnedFd Hand(Node node)
    {
        OwnedFd fd = Posix.MemFd("fake-vfio");
        Posix.Stat(fd, out FileStatus stat);
        _handed.Add((fd.Number, (stat.Device, stat.Inode)));
        _nodes[fd.Number] = node;
        return fd;
    }

    /// <summary>A descriptor as the kernel returns it inside a structure: a bare number that no handle owns yet.</summary>
    private int HandNumber(Node node)
    {
        OwnedFd fd = Hand(node);
        int number = fd.Number;
        fd.SetHandleAsInvalid();
        return number;
    }

    private enum Kind
    {
        Container,
        Group,
        Device,
        Iommufd,
        Data,
    }

    private sealed class Node(Kind kind, string name)
    {
        internal Kind Kind => kind;

        internal string Name => name;

        internal FakeKernelDevice? Device { get; init; }

        internal bool HasIommu { get; set; }

        internal Node? Container { get; set; }
    }
}
