using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>
/// The fixed registers of ACPI that a kernel needs to switch the machine off: event status, event enable and control. No event ever occurs.
/// <code>
/// +0 u16 event status, a 1 clears  +2 u16 event enable  +4 u16 control: 0 SCI_EN, always on; 12:10 sleep type; 13 sleep
/// </code>
/// BQL: held for every call.
/// </summary>
/// <param name="requests">Gets the request to switch off.</param>
internal sealed class AcpiPower(GuestRequests requests) : IIoHandler
{
    /// <summary>First port.</summary>
    public const ushort Port = 0x600;

    /// <summary>Port of the control register.</summary>
    public const ushort ControlPort = Port + 4;

    /// <summary>Number of ports.</summary>
    public const int PortCount = 6;

    /// <summary>The interrupt line for events.</summary>
    public const int Irq = 9;

    /// <summary>Sleep type that switches the machine off.</summary>
    public const byte SleepOff = 5;

    private const ushort SciEnable = 1, Sleep = 1 << 13;

    /// <summary>The section of this product; QEMU has these registers only in chipsets that this machine lacks.</summary>
    public static VmStateDescription<AcpiPower> Description { get; } = new()
    {
        Name = "vmm-acpi-power",
        Fields = [VmState.UInt16<AcpiPower>("pm1_en", static a => ref a._enable), VmState.UInt16<AcpiPower>("pm1_cnt", static a => ref a._control)],
    };

    private ushort _enable, _control = SciEnable;

    /// <summary>Sets the power-on state.</summary>
    public void Reset() => (_enable, _control) = (0, SciEnable);

    /// <inheritdoc/>
    public ulong Read(ulong offset, int size) => ((ulong)_enable << 16 | (ulong)_control << 32) >> (int)(8 * offset);

    /// <inheritdoc/>
    public void Write(ulong offset, int size, ulong value)
    {
        for (int i = 0; i < size; i++) WriteByte((int)offset + i, (byte)(value >> 8 * i));
    }

    private void WriteByte(int at, byte value)
    {
        switch (at)
        {
            case 2: _enable = (ushort)(_enable & 0xff00 | value); break;
            case 3: _enable = (ushort)(_enable & 0x00ff | value << 8); break;
            case 4: _control = (ushort)(_control & 0xff00 | value | SciEnable); break;
            case 5:
                int control = _control & 0x00ff | value << 8;
                _control = (ushort)(control & ~Sleep);
                if ((control & Sleep) != 0 && (control >> 10 & 7) == SleepOff) requests.Post(GuestRequest.Shutdown);
                break;
        }
    }
}
