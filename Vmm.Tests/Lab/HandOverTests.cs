using System.Diagnostics;
using System.Runtime.InteropServices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;
using Vmm.Devices.Vfio.Uapi;
using Vmm.Tests.Support;

namespace Vmm.Tests.Lab;

/// <summary>Devices that pass from one process to another: by a handover with their mappings, or after the death of a process.</summary>
[TestFixture(false, TestName = "HandOver(group)")]
[TestFixture(true, TestName = "HandOver(iommufd)")]
public sealed class HandOverTests(bool iommufd) : LabFixture
{
    internal static readonly byte[] Pattern = [.. Enumerable.Range(7, 64).Select(static i => (byte)i)];

    [Test]
    public void Spec1_8_AnotherProcessUsesTheDeviceByItsDescriptors()
    {
        using var folder = new TempDirectory();
        using var lab = new LabVfio(LabOtherProcess.RamBytes);
        KernelVfioDeviceIo device = lab.Open(LabVfio.Edu, iommufd);
        new LabEdu(device).Enable();
        Pattern.CopyTo(lab.Ram.Slice(0x1000, 64));
        using OwnedFd interrupt = Posix.EventFd();
        Assert.That(device.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionTrigger, VfioPciIrq.Msi, 0, 1), [], [interrupt]), Is.EqualTo(Errno.None));

        using OwnedFd listener = Posix.Socket(Posix.AF_UNIX);
        Assert.That((Posix.Bind(listener, Posix.UnixAddress(folder["s"])), Posix.Listen(listener, 1)), Is.EqualTo((Errno.None, Errno.None)));
        using Process other = LabOtherProcess.Start("--take", folder["s"]);
        try
        {
            Assert.That(Posix.Poll(listener, Posix.POLLIN, null, 120_000, out _), Is.Not.Zero, "the other process connects");
            using OwnedFd socket = Posix.Accept(listener, out Errno errno)!;
            SafeHandle[] handed = [lab.Ram.Fd, device.Fd, interrupt];
            if (device.Container is Type1Container container)
            {
                Assert.That(Suspend(container), Is.EqualTo(Errno.None));
                handed = [.. handed, container.Fd];
            }
            Assert.That(Posix.SendWithFds(socket, [0], handed, out errno), Is.EqualTo(1));
            Assert.That(Posix.Poll(socket, Posix.POLLIN, null, 120_000, out _), Is.Not.Zero, "the other process answers");
            Assert.That(Posix.Receive(socket, new byte[1], 0, out errno), Is.EqualTo(1), "the other process succeeded");
            Assert.That(lab.Ram.ReadOnlySlice(0x3000, 64).ToArray(), Is.EqualTo(Pattern), "the device wrote to this memory from the other process");
            other.WaitForExit();
            Assert.That(other.ExitCode, Is.Zero);
        }
        finally
        {
            if (!other.HasExited) other.Kill();
            other.WaitForExit();
        }
    }

    [Test]
    public void Spec1_7_WhatAKilledProcessLeftBehindIsFoundAndReset()
    {
        using (Process other = LabOtherProcess.Start("--hold", LabVfio.Mtty1, iommufd ? "iommufd" : "group"))
        {
            Assert.That(other.StandardOutput.ReadLine(), Is.EqualTo("held"));
            other.Kill();
            other.WaitForExit();
        }
        using var lab = new LabVfio();
        KernelVfioDeviceIo device = lab.Open(LabVfio.Mtty1, iommufd);
        Assert.That((device.StateAtOpen, LabSession.State(device)), Is.EqualTo(((VfioDeviceState?)VfioDeviceState.PreCopy, VfioDeviceState.Running)));
        byte[] expected = Uart.Change(device);
        using (LabSession.Open(device, VfioDeviceState.PreCopy)) LabSession.Set(device, VfioDeviceState.Running);
        Assert.That(Uart.Observe(device), Is.EqualTo(expected), "the device works after the reset");
    }

    internal static Errno Suspend(Type1Container container)
    {
        var all = new VfioUapi.IommuType1DmaUnmap { Argsz = 24, Flags = VfioUapi.VFIO_DMA_UNMAP_FLAG_VADDR | VfioUapi.VFIO_DMA_UNMAP_FLAG_ALL };
        return new KernelVfio().Call(container.Fd, VfioUapi.VFIO_IOMMU_UNMAP_DMA, ref all);
    }
}

/// <summary>Mappings with a suspended vaddr, which only type1 has.</summary>
[TestFixture(TestName = "HandOver(suspended)")]
public sealed class SuspendedAddressTests : LabFixture
{
    [Test]
    public void Spec1_8_WithoutItsAddressAMappingStaysAndTheDeviceGoesOn()
    {
        using var lab = new LabVfio(LabOtherProcess.RamBytes);
        KernelVfioDeviceIo device = lab.Open(LabVfio.Edu, iommufd: false);
        var edu = new LabEdu(device);
        edu.Enable();
        var container = (Type1Container)device.Container;
        HandOverTests.Pattern.CopyTo(lab.Ram.Slice(0x1000, 64));
        Assert.That(HandOverTests.Suspend(container), Is.EqualTo(Errno.None));
        Assert.That(HandOverTests.Suspend(container), Is.EqualTo(Errno.EINVAL), "the mapping is suspended already");
        edu.Copy(0x1000, 0x2000, 64);
        Assert.That(lab.Ram.ReadOnlySlice(0x2000, 64).ToArray(), Is.EqualTo(HandOverTests.Pattern), "DMA while suspended");
        var back = new VfioUapi.IommuType1DmaMap { Argsz = 32, Flags = VfioUapi.VFIO_DMA_MAP_FLAG_VADDR, Vaddr = (ulong)lab.Ram.HostAddress, Iova = 0, Size = lab.Ram.SizeBytes };
        Assert.That(new KernelVfio().Call(container.Fd, VfioUapi.VFIO_IOMMU_MAP_DMA, ref back), Is.EqualTo(Errno.None));
        edu.Copy(0x1000, 0x3000, 64);
        Assert.That(lab.Ram.ReadOnlySlice(0x3000, 64).ToArray(), Is.EqualTo(HandOverTests.Pattern), "DMA after the remap");
    }
}
