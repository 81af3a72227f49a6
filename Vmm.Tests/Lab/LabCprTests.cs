using System.Buffers.Binary;
using Microsoft.Extensions.Logging.Abstractions;
using Vmm.Core.Cpr;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Kernel;

namespace Vmm.Tests.Lab;

/// <summary>
/// CPR of QEMU's edu behind an emulated Intel IOMMU, while it does DMA: the old owner suspends its addresses, the new owner gives the kernel its
/// own, and the interrupt's eventfd stays (vfio-migration 7.5, 7.6). Both owners are in this process, and each maps the same memory.
/// </summary>
[TestFixture]
public sealed class LabCprTests : LabFixture
{
    private const ulong RaiseInterrupt = 0x60, DmaSource = 0x80, DmaDestination = 0x88, DmaCount = 0x90, DmaCommand = 0x98, Buffer = 0x40000, ToMemory = 2;
    // edu of QEMU 7.2 refuses a transfer of its whole buffer.
    private const int Page = 4096, Bytes = 2048;

    [Test]
    public void Spec7_ADeviceUnderDmaIsHandedOverWithItsMappingsAndItsInterrupt()
    {
        using var lab = new LabVfio();
        using var table = new CprFdTable();
        KernelVfioDeviceIo old = Open(lab, table);
        using OwnedFd interrupt = Posix.EventFd();
        Assert.That(old.SetIrqs(new VfioIrqSet(VfioIrqSetFlags.DataEventFd | VfioIrqSetFlags.ActionTrigger, VfioPciIrq.Msi, 0, 1), [], [interrupt]), Is.EqualTo(Errno.None));
        Fill(lab.Ram, 1);
        Start(old, 0, Buffer, 0);
        Wait(old);
        Start(old, Buffer, Page, ToMemory);
        old.SuspendCpr();
        using var next = new NextHand(lab, table);
        Wait(old);
        Assert.That(lab.Ram.ReadOnlySlice(Page, Bytes).SequenceEqual(lab.Ram.ReadOnlySlice(0, Bytes)), "DMA went on while the addresses were suspended");
        Start(old, Buffer, 2 * Page, ToMemory);
        next.Io.LoadCpr();
        Assert.That(next.Io.Reset(), Is.EqualTo(Errno.None));
        old.HandOverCpr();
        next.Io.ResumeCpr();
        old.Dispose();
        Wait(next.Io);
        Assert.That(next.Ram.ReadOnlySlice(2 * Page, Bytes).SequenceEqual(next.Ram.ReadOnlySlice(0, Bytes)), "the reset of the new owner did not reach the device");
        Fill(next.Ram, 2);
        Start(next.Io, 0, Buffer, 0);
        Wait(next.Io);
        Start(next.Io, Buffer, 3 * Page, ToMemory);
        Wait(next.Io);
        Assert.That(next.Ram.ReadOnlySlice(3 * Page, Bytes).SequenceEqual(next.Ram.ReadOnlySlice(0, Bytes)));
        Write(next.Io, RaiseInterrupt, 1, 4);
        Assert.That(Posix.Poll(interrupt, Posix.POLLIN, null, 10_000, out _), Is.EqualTo(Posix.POLLIN), "the interrupt signals the eventfd that the old owner bound");
    }

    [Test]
    public void Spec7_AFailureOfTheNextHandGivesTheDeviceBack()
    {
        using var lab = new LabVfio();
        using var table = new CprFdTable();
        using KernelVfioDeviceIo old = Open(lab, table);
        old.SuspendCpr();
        using (var next = new NextHand(lab, table)) next.Io.LoadCpr();
        old.ResumeCpr();
        Fill(lab.Ram, 3);
        Start(old, 0, Buffer, 0);
        Wait(old);
        Start(old, Buffer, Page, ToMemory);
        Wait(old);
        Assert.That(lab.Ram.ReadOnlySlice(Page, Bytes).SequenceEqual(lab.Ram.ReadOnlySlice(0, Bytes)));
        // A further suspend works.
        old.SuspendCpr();
        old.ResumeCpr();
    }

    [Test]
    public void Spec7_5_AMediatedDeviceSaysWhyItCannotBeHandedOver()
    {
        using var lab = new LabVfio();
        Assert.That(lab.Open(LabVfio.Mtty1, iommufd: false).CprBlockedReason, Does.Contain("mediated").And.Contain("suspend"));
    }

    private static KernelVfioDeviceIo Open(LabVfio lab, CprFdTable table)
    {
        KernelVfioDeviceIo io = lab.Containers.Open(new VfioDeviceChoice(LabVfio.Edu, false), table);
        io.EnterCpr(table, "edu");
        Assert.That(io.CprBlockedReason, Is.Null);
        // Enable memory space and bus master.
        Assert.That(io.RegionWrite(VfioPciRegion.Config, 4, [6, 0]), Is.EqualTo(Errno.None));
        return io;
    }

    private static void Fill(RamBlock ram, byte seed)
    {
        Span<byte> page = ram.Slice(0, Page);
        for (int i = 0; i < Page; i++) page[i] = (byte)(seed + (i * 7));
    }

    private static void Start(KernelVfioDeviceIo io, ulong source, ulong destination, ulong direction)
    {
        Write(io, DmaSource, source, 8);
        Write(io, DmaDestination, destination, 8);
        Write(io, DmaCount, Bytes, 8);
        Write(io, DmaCommand, 1 | direction, 8);
    }

    private static void Wait(KernelVfioDeviceIo io)
    {
        byte[] command = new byte[8];
        Assert.That(SpinWait.SpinUntil(() => io.RegionRead(0, DmaCommand, command) == Errno.None && (command[0] & 1) == 0, TimeSpan.FromSeconds(30)), "the DMA transfer did not end in time");
    }

    private static void Write(KernelVfioDeviceIo io, ulong offset, ulong value, int size)
    {
        byte[] bytes = new byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(bytes, value);
        Assert.That(io.RegionWrite(0, offset, bytes.AsSpan(0, size)), Is.EqualTo(Errno.None));
    }

    /// <summary>The new owner. It gets duplicates of the descriptors, as over SCM_RIGHTS, and maps the same memory at another address.</summary>
    private sealed class NextHand : IDisposable
    {
        private readonly GuestMemory _memory = new();
        private readonly CprFdTable _table = new();
        private readonly VfioContainers _containers;

        internal NextHand(LabVfio lab, CprFdTable from)
        {
            Ram = _memory.AddBlock(new RamBlockOptions { Name = lab.Ram.Name, SizeBytes = lab.Ram.SizeBytes, Inherited = Posix.Duplicate(lab.Ram.Fd) }, lab.Ram.Address);
            _table.Receive(new CprIncoming(MigrationMode.CprTransfer, [.. from.Entries().Select(static e => e with { Fd = Posix.Duplicate(e.Fd) })], []));
            _containers = new VfioContainers(_memory, new KernelVfio(), LabVfio.Paths, NullLoggerFactory.Instance);
            Io = _containers.Open(new VfioDeviceChoice(LabVfio.Edu, false), _table);
        }

        internal RamBlock Ram { get; }

        internal KernelVfioDeviceIo Io { get; }

        public void Dispose()
        {
            Io.Dispose();
            _containers.Dispose();
            _table.Dispose();
            _memory.Dispose();
        }
    }
}
