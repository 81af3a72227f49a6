using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>
/// The small devices that every PC guest touches: the keyboard controller's reset line, a CMOS with the memory size, and an exit port for test
/// guests. Machine parts of a VM with an accelerator.
/// </summary>
public sealed class LegacyDevices : IDisposable
{
    /// <summary>A write here ends the guest with the value as its exit code (QEMU: <c>isa-debug-exit</c>).</summary>
    public const ushort DebugExitPort = 0x501;

    private readonly List<IDisposable> _registrations = [];

    /// <summary>Adds the devices. BQL: held.</summary>
    /// <param name="services">The VM's services.</param>
    public LegacyDevices(IDeviceServices services)
    {
        ArgumentNullException.ThrowIfNull(services);
        var cmos = new Cmos(services.Memory.TotalBytes);
        _registrations.Add(services.Io.AddPorts(0x70, 2, "cmos", cmos));
        _registrations.Add(services.RegisterVmState(Cmos.Description, cmos));
        _registrations.Add(services.Io.AddPorts(0x60, 1, "i8042", new KeyboardController(services.Requests)));
        _registrations.Add(services.Io.AddPorts(0x64, 1, "i8042", new KeyboardController(services.Requests)));
        _registrations.Add(services.Io.AddPorts(0xcf9, 1, "reset-control", new ResetControl(services.Requests)));
        _registrations.Add(services.Io.AddPorts(DebugExitPort, 4, "isa-debug-exit", new DebugExit(services.Requests)));
    }

    /// <summary>Removes the devices. BQL: held.</summary>
    public void Dispose()
    {
        for (int i = _registrations.Count - 1; i >= 0; i--) _registrations[i].Dispose();
        _registrations.Clear();
    }

    private sealed class DebugExit(GuestRequests requests) : IIoHandler
    {
        public ulong Read(ulong offset, int size) => 0;

        public void Write(ulong offset, int size, ulong value) => requests.Post(GuestRequest.Shutdown, (int)value);
    }

    private sealed class ResetControl(GuestRequests requests) : IIoHandler
    {
        public ulong Read(ulong offset, int size) => 0;

        public void Write(ulong offset, int size, ulong value)
        {
            if ((value & 4) != 0) requests.Post(GuestRequest.Reset);
        }
    }

    /// <summary>No keyboard: the status is "idle", and command 0xfe pulls the reset line.</summary>
    private sealed class KeyboardController(GuestRequests requests) : IIoHandler
    {
        public ulong Read(ulong offset, int size) => 0;

        public void Write(ulong offset, int size, ulong value)
        {
            if ((byte)value == 0xfe) requests.Post(GuestRequest.Reset);
        }
    }
}

/// <summary>A CMOS without a running clock: the index register and 128 bytes (QEMU keeps more in <c>mc146818rtc</c>, which this is not). BQL: held.</summary>
public sealed class Cmos : IIoHandler
{
    private const int ExtendedLow = 0x17, ExtendedCopyLow = 0x30, Above16MiBLow = 0x34, Above4GiBLow = 0x5b;

    /// <summary>Its section.</summary>
    public static VmStateDescription<Cmos> Description { get; } = new()
    {
        Name = "vmm-cmos",
        Fields = [VmState.UInt8<Cmos>("index", static c => ref c._index), VmState.Buffer<Cmos>("data", 128, static c => c._data)],
    };

    private readonly byte[] _data = new byte[128];
    private byte _index;

    /// <summary>Makes one that tells the memory size the PC way.</summary>
    /// <param name="memoryBytes">RAM of the machine.</param>
    public Cmos(ulong memoryBytes)
    {
        _data[0x0d] = 0x80; // The battery is good.
        _data[0x0b] = 0x02; // 24 hours, BCD.
        ulong extendedKiB = Math.Min(memoryBytes > 1 << 20 ? (memoryBytes - (1 << 20)) >> 10 : 0, ushort.MaxValue);
        Word(ExtendedLow, extendedKiB);
        Word(ExtendedCopyLow, extendedKiB);
        Word(Above16MiBLow, Math.Min(memoryBytes > 16 << 20 ? (memoryBytes - (16 << 20)) >> 16 : 0, ushort.MaxValue));
        Word(Above4GiBLow, 0);
    }

    /// <inheritdoc/>
    public ulong Read(ulong offset, int size) => offset == 0 ? 0xffu : _data[_index];

    /// <inheritdoc/>
    public void Write(ulong offset, int size, ulong value)
    {
        if (offset == 0) _index = (byte)(value & 0x7f);
        else if (_index > 0x0d) _data[_index] = (byte)value;
    }

    private void Word(int at, ulong value) => (_data[at], _data[at + 1]) = ((byte)value, (byte)(value >> 8));
}
