using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using static Vmm.Core.Kvm.KvmUapi;

namespace Vmm.Core.Kvm;

/// <summary>The KVM of the host: <c>/dev/kvm</c>, its capabilities, and the CPUID that it supports. Thread-safe after it was opened.</summary>
internal sealed class KvmSystem : IDisposable
{
    internal const string DefaultPath = "/dev/kvm";
    private const string WithoutHint = "run without KVM";
    private const int MaxCpuidEntries = 256, MaxMsrs = 4096;

    private readonly OwnedFd _fd;

    private KvmSystem(OwnedFd fd, string path)
    {
        _fd = fd;
        int version = Ioctl.Invoke(fd, KVM_GET_API_VERSION, 0, out Errno errno);
        if (version < 0) throw new KvmException($"'{path}' is not KVM: KVM_GET_API_VERSION: {Posix.Describe(errno)}", errno) { Hint = WithoutHint };
        if (version != (int)KVM_API_VERSION) throw new KvmException($"KVM has API version {version}, expected {KVM_API_VERSION}", Errno.EINVAL) { Hint = WithoutHint };
        foreach ((uint capability, string name) in ((uint, string)[])
            [
                (KVM_CAP_USER_MEMORY, "user memory"), (KVM_CAP_IRQCHIP, "in-kernel irqchip"), (KVM_CAP_PIT2, "in-kernel PIT"), (KVM_CAP_PIT_STATE2, "PIT state"),
                (KVM_CAP_IMMEDIATE_EXIT, "immediate exit"), (KVM_CAP_IRQ_ROUTING, "interrupt routing"), (KVM_CAP_IRQFD, "irqfd"), (KVM_CAP_IOEVENTFD, "ioeventfd"),
                (KVM_CAP_SIGNAL_MSI, "MSI"), (KVM_CAP_XCRS, "XCRs"), (KVM_CAP_VCPU_EVENTS, "vCPU events"), (KVM_CAP_DEBUGREGS, "debug registers"),
                (KVM_CAP_MP_STATE, "MP state"), (KVM_CAP_ADJUST_CLOCK, "guest clock"), (KVM_CAP_GET_TSC_KHZ, "TSC rate"),
            ])
            if (Extension(capability) <= 0) throw new KvmException($"the kernel's KVM lacks: {name}", Errno.EOPNOTSUPP) { Hint = WithoutHint };
        RunBytes = Invoke(KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE");
        SupportedCpuid = ReadCpuid();
        MsrIndices = ReadMsrIndices();
    }

    /// <summary>Length of the mapping of <c>struct kvm_run</c>, with the pages after it.</summary>
    internal int RunBytes { get; }

    /// <summary>The CPUID that KVM supports on this host.</summary>
    internal CpuidEntry2[] SupportedCpuid { get; }

    /// <summary>MSRs that the kernel can save and restore.</summary>
    internal uint[] MsrIndices { get; }

    /// <summary>Opens KVM and checks that it has all that this product needs.</summary>
    /// <exception cref="KvmException">KVM is missing, forbidden or too old; the hint says what to do.</exception>
    internal static KvmSystem Open(string path = DefaultPath)
    {
        OwnedFd? fd = Posix.Open(path, Posix.O_RDWR, 0, out Errno errno);
        if (fd is null)
        {
            throw new KvmException($"cannot open '{path}': {Posix.Describe(errno)}", errno)
            {
                Hint = errno switch
                {
                    Errno.ENOENT or Errno.ENODEV or Errno.ENXIO => "load the kernel module kvm_intel or kvm_amd and enable virtualisation in the firmware, or " + WithoutHint,
                    Errno.EACCES or Errno.EPERM => $"give this user access to '{path}', usually by adding it to the group 'kvm', or {WithoutHint}",
                    _ => WithoutHint,
                },
            };
        }
        try
        {
            return new KvmSystem(fd, path);
        }
        catch
        {
            fd.Dispose();
            throw;
        }
    }

    /// <summary>Returns the value of a capability; 0 if the kernel does not know it.</summary>
    internal int Extension(uint capability) => Math.Max(0, Ioctl.Invoke(_fd, KVM_CHECK_EXTENSION, (nint)capability, out _));

    /// <summary>Creates a VM and returns its descriptor.</summary>
    internal OwnedFd CreateVm() => new(Invoke(KVM_CREATE_VM, 0, "KVM_CREATE_VM"));

    public void Dispose() => _fd.Dispose();

    private int Invoke(uint request, nint value, string name)
    {
        int result = Ioctl.Invoke(_fd, request, value, out Errno errno);
        return result >= 0 ? result : throw Failed(name, errno);
    }

    internal static KvmException Failed(string what, Errno errno) => new($"{what}: {Posix.Describe(errno)}", errno);

    private CpuidEntry2[] ReadCpuid()
    {
        byte[] buffer = new byte[8 + MaxCpuidEntries * 40];
        BinaryPrimitives.WriteUInt32LittleEndian(buffer, MaxCpuidEntries);
        if (Ioctl.Invoke(_fd, KVM_GET_SUPPORTED_CPUID, buffer, out Errno errno) < 0) throw Failed("KVM_GET_SUPPORTED_CPUID", errno);
        var entries = new CpuidEntry2[BinaryPrimitives.ReadInt32LittleEndian(buffer)];
        buffer.AsSpan(8, entries.Length * 40).CopyTo(Ioctl.AsBytes<CpuidEntry2>(entries));
        return entries;
    }

    private uint[] ReadMsrIndices()
    {
        uint[] buffer = new uint[1 + MaxMsrs];
        buffer[0] = MaxMsrs;
        if (Ioctl.Invoke(_fd, KVM_GET_MSR_INDEX_LIST, Ioctl.AsBytes<uint>(buffer), out Errno errno) < 0) throw Failed("KVM_GET_MSR_INDEX_LIST", errno);
        return buffer[1..(1 + (int)buffer[0])];
    }
}
