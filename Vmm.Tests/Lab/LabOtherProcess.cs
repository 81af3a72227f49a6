using System.Diagnostics;
using System.Reflection;
using Microsoft.Extensions.Logging.Abstractions;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Devices.Vfio.Uapi;

namespace Vmm.Tests.Lab;

/// <summary>
/// The other process that some tests need: <c>--take SOCKET</c> receives descriptors and uses the device; <c>--hold DEVICE iommufd|group</c> puts
/// a device into PRE_COPY and waits until it is killed.
/// </summary>
internal static class LabOtherProcess
{
    internal const ulong RamBytes = 1 << 20, OwnIova = 0x800000;

    /// <summary>Runs as the other process.</summary>
    /// <returns>The exit code; null when the arguments do not ask for the other process.</returns>
    internal static int? Run(string[] arguments)
    {
        switch (arguments)
        {
            case ["--take", var socket]:
                Take(socket);
                return 0;
            case ["--hold", var device, var way]:
                Hold(device, way == "iommufd");
                return 0;
            default:
                return null;
        }
    }

    /// <summary>Starts this program as another process, with its stdout redirected.</summary>
    internal static Process Start(params string[] arguments)
    {
        var info = new ProcessStartInfo(Environment.ProcessPath!, [Assembly.GetExecutingAssembly().Location, .. arguments]) { RedirectStandardOutput = true };
        return Process.Start(info)!;
    }

    private static void Hold(string path, bool iommufd)
    {
        using var lab = new LabVfio();
        KernelVfioDeviceIo device = lab.Open(path, iommufd);
        using OwnedFd data = LabSession.Open(device, VfioDeviceState.PreCopy);
        // Open stdout directly: the test reads this line from it.
        using var output = new StreamWriter(Console.OpenStandardOutput()) { AutoFlush = true };
        output.WriteLine("held");
        new ManualResetEventSlim().Wait();
    }

    private static void Take(string path)
    {
        using OwnedFd socket = Posix.Socket(Posix.AF_UNIX);
        Errno errno = Posix.Connect(socket, Posix.UnixAddress(path), null, 30_000);
        if (errno != Errno.None) throw Posix.Error(path, errno);
        var fds = new List<OwnedFd>();
        if (Posix.ReceiveWithFds(socket, new byte[1], fds, wait: true, out errno) != 1) throw Posix.Error(path, errno);
        var kernel = new KernelVfio();
        using var memory = new GuestMemory();
        // Map the same memory at another address.
        RamBlock ram = memory.AddBlock(new RamBlockOptions { Name = "taken", SizeBytes = RamBytes, FilePath = $"/proc/self/fd/{fds[0].Number}" });
        RamBlock own = memory.AddBlock(new RamBlockOptions { Name = "own", SizeBytes = RamBlock.PageSize }, new GuestAddress(OwnIova));
        using var device = new KernelVfioDeviceIo("taken", fds[1], kernel, null!, NullLogger.Instance, null);
        var edu = new LabEdu(device);
        if (fds.Count > 3)
        {
            Map(kernel, fds[3], VfioUapi.VFIO_DMA_MAP_FLAG_VADDR, ram, 0);
            Map(kernel, fds[3], VfioUapi.VFIO_DMA_MAP_FLAG_READ | VfioUapi.VFIO_DMA_MAP_FLAG_WRITE, own, OwnIova);
            edu.Copy(0x1000, OwnIova, 64);
            if (!own.ReadOnlySlice(0, 64).SequenceEqual(ram.ReadOnlySlice(0x1000, 64))) throw new InvalidDataException("memory mapped here holds something else than what was copied");
        }
        edu.Copy(0x1000, 0x3000, 64);
        edu.Raise();
        if ((Posix.Poll(fds[2], Posix.POLLIN, null, 30_000, out _) & Posix.POLLIN) == 0) throw new InvalidDataException("no interrupt");
        if (Posix.SendWithFds(socket, [1], [], out errno) != 1) throw Posix.Error(path, errno);
    }

    private static void Map(KernelVfio kernel, OwnedFd container, uint flags, RamBlock block, ulong iova)
    {
        var map = new VfioUapi.IommuType1DmaMap { Argsz = 32, Flags = flags, Vaddr = (ulong)block.HostAddress, Iova = iova, Size = block.SizeBytes };
        Errno errno = kernel.Call(container, VfioUapi.VFIO_IOMMU_MAP_DMA, ref map);
        if (errno != Errno.None) throw Posix.Error($"mapping '{block.Name}' with flags {flags}", errno);
    }
}
