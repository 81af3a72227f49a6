using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>
/// A keyboard controller without keyboard and mouse: commands, output buffer and reset line (QEMU: <c>pckbd</c>). Port 0x60 is for data, port 0x64
/// for status and commands. BQL: held for every call.
/// </summary>
/// <param name="requests">Gets the request to reset.</param>
/// <param name="irqs">Has the lines 1 and 12.</param>
internal sealed class I8042(GuestRequests requests, IsaIrqs irqs)
{
    /// <summary>Data port.</summary>
    public const ushort DataPort = 0x60;

    /// <summary>Status and command port.</summary>
    public const ushort CommandPort = 0x64;

    private const byte StatusFull = 0x01, StatusSelfTest = 0x04, StatusCommand = 0x08, StatusUnlocked = 0x10, StatusAuxFull = 0x20;
    private const byte ModeKeyboardIrq = 0x01, ModeMouseIrq = 0x02, ModeKeyboardOff = 0x10, ModeMouseOff = 0x20;
    private const byte OutReset = 0x01, OutA20 = 0x02, OutOnes = 0xcc, OutFull = 0x10, OutAuxFull = 0x20;
    private const byte PendingControlKeyboard = 0x04, PendingControlAux = 0x08;
    private const uint SourceControl = 4;

    /// <summary>QEMU's <c>vmstate_kbd</c>. A load drops pending bytes of a keyboard or mouse, because this machine has neither.</summary>
    public static VmStateDescription<I8042> Description { get; } = new()
    {
        Name = "pckbd",
        VersionId = 3,
        MinimumVersionId = 3,
        Fields =
        [
            VmState.UInt8<I8042>("write_cmd", static k => ref k._command),
            VmState.UInt8<I8042>("status", static k => ref k._status),
            VmState.UInt8<I8042>("mode", static k => ref k._mode),
            VmState.UInt8<I8042>("pending_tmp", static k => ref k._pending),
        ],
        Subsections =
        [
            new VmStateDescription<I8042>
            {
                Name = "pckbd_outport", Needed = static k => k._outport != k.UsualOutport,
                Fields = [VmState.UInt8<I8042>("outport", static k => ref k._loadedOutport)],
                PreSave = static k => k._loadedOutport = k._outport,
            },
            new VmStateDescription<I8042>
            {
                Name = "pckbd/extended_state", VersionId = 0, MinimumVersionId = 0,
                Fields =
                [
                    VmState.UInt32<I8042>("migration_flags", static k => ref k._flags), VmState.UInt32<I8042>("obsrc", static k => ref k._source),
                    VmState.UInt8<I8042>("obdata", static k => ref k._data), VmState.UInt8<I8042>("cbdata", static k => ref k._controlData),
                ],
            },
        ],
        PreLoad = static k => (k._loadedOutport, k._flags, k._source, k._data, k._controlData) = (0, 0, 0, 0, 0),
        PostLoad = static (k, _) => k.AfterLoad(),
    };

    /// <summary>QEMU's <c>vmstate_kbd_isa</c>, the section of the controller on the ISA bus: the same bytes, nested in a struct.</summary>
    public static VmStateDescription<I8042> IsaDescription { get; } = new()
    {
        Name = "pckbd", VersionId = 3, MinimumVersionId = 3,
        Fields = [VmState.Struct<I8042, I8042>("kbd", Description, static k => k)],
    };

    private byte _command, _status = StatusCommand | StatusUnlocked, _mode = ModeKeyboardIrq | ModeMouseIrq, _pending, _outport = OutReset | OutA20 | OutOnes;
    private byte _loadedOutport, _data, _controlData;
    private uint _flags, _source;

    /// <summary>The data register.</summary>
    public IIoHandler Data => new Register(() => ReadData(), WriteData);

    /// <summary>The status and command register.</summary>
    public IIoHandler Command => new Register(() => _status, WriteCommand);

    private byte UsualOutport =>
        (byte)(OutReset | OutA20 | OutOnes | ((_status & StatusFull) != 0 ? OutFull : 0) | ((_status & StatusAuxFull) != 0 ? OutAuxFull : 0));

    /// <summary>Sets the power-on state.</summary>
    public void Reset()
    {
        (_command, _status, _mode, _pending, _outport) = (0, StatusCommand | StatusUnlocked, ModeKeyboardIrq | ModeMouseIrq, 0, OutReset | OutA20 | OutOnes);
        (_data, _controlData, _flags, _source) = (0, 0, 0, 0);
        UpdateIrqs();
    }

    private byte ReadData()
    {
        if ((_status & StatusFull) == 0) return _data;
        (_data, _pending) = (_controlData, 0);
        Show();
        return _data;
    }

    private void WriteData(byte value)
    {
        switch (_command)
        {
            case 0x60:
                _mode = value;
                UpdateIrqs();
                break;
            case 0xd1:
                _outport = value;
                if ((value & OutReset) == 0) requests.Post(GuestRequest.Reset);
                break;
            case 0xd2: Queue(value); break;
            case 0xd3: Queue(value, isAux: true); break;
            case 0: _mode &= unchecked((byte)~ModeKeyboardOff); break; // A byte for the keyboard; there is none to answer.
            case 0xd4: _mode &= unchecked((byte)~ModeMouseOff); break;
        }
        _command = 0;
    }

    private void WriteCommand(byte value)
    {
        switch (value)
        {
            case 0x20: Queue(_mode); break;
            case 0x60 or 0xd1 or 0xd2 or 0xd3 or 0xd4: _command = value; break;
            case 0xa7: _mode |= ModeMouseOff; break;
            case 0xa8: _mode &= unchecked((byte)~ModeMouseOff); break;
            case 0xa9 or 0xab: Queue(0); break;
            case 0xaa:
                _status |= StatusSelfTest;
                Queue(0x55);
                break;
            case 0xad: _mode |= ModeKeyboardOff; break;
            case 0xae: _mode &= unchecked((byte)~ModeKeyboardOff); break;
            case 0xc0: Queue(0x80); break;
            case 0xd0: Queue(_outport); break;
            // A pulse of some of four output lines; line 0 is the reset.
            case >= 0xf0 when (value & 1) == 0: requests.Post(GuestRequest.Reset); break;
        }
    }

    private void Queue(byte value, bool isAux = false)
    {
        (_controlData, _source, _pending) = (value, SourceControl, isAux ? PendingControlAux : PendingControlKeyboard);
        Show();
    }

    private void Show()
    {
        _status &= unchecked((byte)~(StatusFull | StatusAuxFull));
        _outport &= unchecked((byte)~(OutFull | OutAuxFull));
        if (_pending != 0)
        {
            _status |= StatusFull;
            _outport |= OutFull;
            if (_pending == PendingControlAux)
            {
                _status |= StatusAuxFull;
                _outport |= OutAuxFull;
            }
        }
        UpdateIrqs();
    }

    private void UpdateIrqs()
    {
        bool isFull = (_status & StatusFull) != 0, isAux = (_status & StatusAuxFull) != 0;
        irqs.Set(1, isFull && !isAux && (_mode & (ModeKeyboardIrq | ModeKeyboardOff)) == ModeKeyboardIrq);
        irqs.Set(12, isFull && isAux && (_mode & ModeMouseIrq) != 0);
    }

    private void AfterLoad()
    {
        // An older stream does not name the source of a pending byte. It was a keyboard or mouse, which this machine lacks.
        _pending &= PendingControlKeyboard | PendingControlAux;
        if (_pending == 0) _status &= unchecked((byte)~(StatusFull | StatusAuxFull));
        _outport = _loadedOutport != 0 ? _loadedOutport : UsualOutport;
    }

    private sealed class Register(Func<byte> read, Action<byte> write) : IIoHandler
    {
        public ulong Read(ulong offset, int size) => read();

        public void Write(ulong offset, int size, ulong value) => write((byte)value);
    }
}
