using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.Device;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Vfio.Device;

/// <summary>A VFIO device on a VM's bus, with the accesses that a guest makes.</summary>
internal sealed class VfioDeviceFixture : IDisposable
{
    internal const ulong Bar0 = 0xfe000000, Bar2 = 0x2_0000_0000;

    private readonly bool _ownsServices;

    internal VfioDeviceFixture(FakeVfioIo? io = null, string options = "", TestServices? services = null, TestServices? ownedServices = null)
    {
        _ownsServices = services is null;
        Services = services ?? ownedServices ?? new TestServices();
        Io = io ?? Typical();
        using (Services.Bql.Acquire()) Device = new VfioPciDevice(DeviceOptions.Parse("vfio" + options), Io, Services);
        Io.IrqLog.Clear();
        Io.WriteLog.Clear();
    }

    internal TestServices Services { get; }

    internal FakeVfioIo Io { get; }

    internal VfioPciDevice Device { get; }

    internal RecordingInterruptController Interrupts => Services.Interrupts;

    /// <summary>
    /// A device with 4 KiB in BAR 0, ports in BAR 1, a 64-bit BAR 2 of 16 KiB with 4 MSI-X vectors, 4 MSI vectors, power management and a
    /// vendor-specific capability.
    /// </summary>
    internal static FakeVfioIo Typical(int configBytes = 4096) => new FakeVfioIo(configBytes)
        .Bar(0, 4096, 0).Bar(1, 32, 1).Bar(2, 0x4000, 0xc)
        .Capability(0x40, 0x01, 0, 3, 0, 0, 0, 0, 0)
        .Capability(0x50, 0x05, 0, 0x84, 0x01)
        .Capability(0x70, 0x11, 0, 3, 0, 2, 0x10, 0, 0, 2, 0x18, 0, 0)
        .Capability(0x80, 0x09, 0, 0x10, 0xaa, 0xbb)
        .Irq(VfioPciIrq.Msi, 4).Irq(VfioPciIrq.Msix, 4)
        .PoweredOn();

    internal uint Read(int offset, int size = 4) => Services.Pci.ConfigRead(Device.Function.Address.DevFn, offset, size);

    internal void Write(int offset, int size, uint value) => Services.Pci.ConfigWrite(Device.Function.Address.DevFn, offset, size, value);

    /// <summary>Gives the BARs addresses, and sets the command register so that they decode.</summary>
    internal VfioDeviceFixture Mapped(uint command = 7)
    {
        Write(0x10, 4, unchecked((uint)Bar0));
        Write(0x14, 4, 0xc000);
        Write(0x18, 4, unchecked((uint)Bar2));
        Write(0x1c, 4, (uint)(Bar2 >> 32));
        Write(4, 2, command);
        Io.WriteLog.Clear();
        return this;
    }

    internal ulong MmioRead(ulong address, int size = 4) => Services.Pci.MmioRead(new GuestAddress(address), size);

    internal void MmioWrite(ulong address, int size, ulong value) => Services.Pci.MmioWrite(new GuestAddress(address), size, value);

    /// <summary>Programs a vector of the MSI-X table.</summary>
    internal void Vector(int vector, ulong address, uint data, bool masked = false)
    {
        ulong entry = Bar2 + 0x1000 + 16 * (ulong)vector;
        MmioWrite(entry, 8, address);
        MmioWrite(entry + 8, 4, data);
        MmioWrite(entry + 12, 4, masked ? 1u : 0);
    }

    /// <summary>Waits for this many messages, and takes them.</summary>
    internal (ulong Address, uint Data)[] Messages(int count)
    {
        Interrupts.WaitFor(i => i.Msi.Count >= count, $"{count} messages");
        return [.. Interrupts.Msi.Select(static m => (m.Message.Address, m.Message.Data))];
    }

    internal byte[] Save() => Save(f => Device.SaveConfig(f));

    internal void Load(byte[] record, bool apply = true) => Load(record, f => Device.LoadConfig(f, apply));

    /// <summary>Saves the record for the next process.</summary>
    internal byte[] SaveCpr() => Save(f => ((VfioPciFunction)Device.Function).SaveCpr(f));

    /// <summary>Loads the record as the next process does.</summary>
    internal void LoadCpr(byte[] record) => Load(record, f => ((VfioPciFunction)Device.Function).LoadCpr(f));

    private byte[] Save(Action<QemuFileWriter> save)
    {
        var channel = new MemoryChannel();
        using var f = new QemuFileWriter(channel);
        using (Services.Bql.Acquire()) save(f);
        f.Flush();
        return channel.Written;
    }

    private void Load(byte[] record, Action<QemuFileReader> load)
    {
        var f = new QemuFileReader(new MemoryChannel([.. record, 0xff])) { Section = "0000:00:01.0/vfio" };
        using (Services.Bql.Acquire()) load(f);
        Assert.That(f.Position, Is.EqualTo(record.Length), "the device reads exactly its record");
    }

    internal void Locked(Action<VfioPciDevice> call)
    {
        using (Services.Bql.Acquire()) call(Device);
    }

    public void Dispose()
    {
        Device.Dispose();
        if (_ownsServices) Services.Dispose();
    }
}
