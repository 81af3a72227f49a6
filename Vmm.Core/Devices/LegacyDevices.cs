using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>
/// The small devices that every PC guest uses: keyboard controller, real-time clock with CMOS, PCI host bridge, ACPI registers, reset port, and an exit
/// port for test guests. A VM with an accelerator has them.
/// </summary>
internal sealed class LegacyDevices : IDisposable
{
    /// <summary>A write to this port switches the guest off; the value is its exit code (QEMU: <c>isa-debug-exit</c>).</summary>
    public const ushort DebugExitPort = 0x501;

    /// <summary>A write to this port with bit 2 set resets the machine.</summary>
    public const ushort ResetPort = 0xcf9;

    private readonly List<IDisposable> _registrations = [];
    private readonly AcpiPower _power;
    private readonly Cmos _cmos;
    private readonly I8042 _keyboard;
    private readonly HostBridge _bridge;

    /// <summary>Adds the devices. BQL: held.</summary>
    public LegacyDevices(IDeviceServices services)
    {
        ArgumentNullException.ThrowIfNull(services);
        _bridge = new HostBridge(services);
        _registrations.Add(_bridge);
        _power = new AcpiPower(services.Requests);
        _registrations.Add(services.Io.AddPorts(AcpiPower.Port, AcpiPower.PortCount, "acpi-power", _power));
        _registrations.Add(services.RegisterVmState(AcpiPower.Description, _power));
        _cmos = new Cmos(services);
        _registrations.Add(_cmos);
        _registrations.Add(services.Io.AddPorts(Cmos.Port, 2, "rtc", _cmos));
        _registrations.Add(services.RegisterVmState(Cmos.Description, _cmos));
        _registrations.Add(services.RunState.Register(_cmos));
        _keyboard = new I8042(services.Requests, services.Irqs);
        _registrations.Add(services.Io.AddPorts(I8042.DataPort, 1, "i8042", _keyboard.Data));
        _registrations.Add(services.Io.AddPorts(I8042.CommandPort, 1, "i8042", _keyboard.Command));
        _registrations.Add(services.RegisterVmState(I8042.IsaDescription, _keyboard));
        _registrations.Add(services.Io.AddPorts(ResetPort, 1, "reset-control", new ResetControl(services.Requests)));
        _registrations.Add(services.Io.AddPorts(DebugExitPort, 4, "isa-debug-exit", new DebugExit(services.Requests)));
    }

    /// <summary>Sets the power-on state. BQL: held.</summary>
    public void Reset()
    {
        _bridge.Reset();
        _power.Reset();
        _cmos.Reset();
        _keyboard.Reset();
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
}
