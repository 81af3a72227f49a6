using Vmm.Core.RunStates;
using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>
/// The PC's real-time clock and CMOS: index and data ports, time in UTC, alarm, update and periodic interrupts on line 8, and 114 bytes of memory that
/// tell the RAM size. The section is QEMU's. The clock follows the host's, so that a guest that was stopped or moved finds the true time (QEMU:
/// <c>mc146818rtc</c>). BQL: held for every call.
/// </summary>
internal sealed class Cmos : IIoHandler, IVmStateHandler, IDisposable
{
    /// <summary>Port of the index; the data port is the next one.</summary>
    public const ushort Port = 0x70;

    /// <summary>Register of the century.</summary>
    public const byte CenturyIndex = 0x32;

    private const int Bytes = 128, Irq = 8;
    private const int RegA = 10, RegB = 11, RegC = 12, RegD = 13, ExtendedLow = 0x17, ExtendedCopyLow = 0x30, Above16MiBLow = 0x34;
    private const byte InProgress = 0x80, Set = 0x80, PeriodicEnable = 0x40, AlarmEnable = 0x20, UpdateEnable = 0x10, Binary = 0x04, Hours24 = 0x02;
    private const byte Pending = 0x80, PeriodicFlag = 0x40, AlarmFlag = 0x20, UpdateFlag = 0x10, Valid = 0x80, AnyAlarm = 0xc0, AfterNoon = 0x80;
    private const long SecondNs = 1_000_000_000, UpdateNs = 244_000;
    private const int CrystalHz = 32768;

    /// <summary>QEMU's <c>vmstate_rtc</c>. Expiry times are times of the host's wall clock.</summary>
    public static VmStateDescription<Cmos> Description { get; } = new()
    {
        Name = "mc146818rtc",
        VersionId = 3,
        MinimumVersionId = 3,
        Fields =
        [
            VmState.Buffer<Cmos>("cmos_data", Bytes, static c => c._data),
            VmState.UInt8<Cmos>("cmos_index", static c => ref c._index),
            VmState.Unused<Cmos>(7 * 4),
            VmState.Timer<Cmos>("periodic_timer", static c => ref c._periodicNs),
            VmState.Int64<Cmos>("next_periodic_time", static c => ref c._nextPeriodicNs),
            VmState.Unused<Cmos>(3 * 8),
            VmState.UInt32<Cmos>("irq_coalesced", static c => ref c._coalesced),
            VmState.UInt32<Cmos>("period", static c => ref c._period),
            VmState.UInt64<Cmos>("base_rtc", static c => ref c._baseSeconds),
            VmState.UInt64<Cmos>("last_update", static c => ref c._baseAtNs),
            VmState.Int64<Cmos>("offset", static c => ref c._offsetNs),
            VmState.Timer<Cmos>("update_timer", static c => ref c._updateNs),
            VmState.UInt64<Cmos>("next_alarm_time", static c => ref c._nextAlarm),
        ],
        PreSave = static c => c.ShowTime(),
        PostLoad = static (c, _) => c.AfterLoad(),
    };

    private readonly IsaIrqs _irqs;
    private readonly TimeProvider _time;
    private readonly VmClock _clock;
    private readonly VmTimer _timer;
    private readonly ulong _memoryBytes;

    // Migrated state. Times are ns of the wall clock since 1970; -1 for none.
    private readonly byte[] _data = new byte[Bytes];
    private byte _index;
    private long _periodicNs = -1, _nextPeriodicNs, _offsetNs, _updateNs = -1;
    private uint _coalesced, _period;
    private ulong _baseSeconds, _baseAtNs, _nextAlarm = ulong.MaxValue;

    /// <summary>Makes the device and writes the RAM size into its memory, in the registers that a PC's firmware uses.</summary>
    /// <param name="services">Services of the device's VM.</param>
    /// <param name="time">Source of the wall-clock time; null for the host's.</param>
    public Cmos(IDeviceServices services, TimeProvider? time = null)
    {
        ArgumentNullException.ThrowIfNull(services);
        (_irqs, _time, _clock, _memoryBytes) = (services.Irqs, time ?? TimeProvider.System, services.Clock, services.Memory.TotalBytes);
        _timer = services.Clock.CreateTimer(OnTimer);
        (_data[RegA], _data[RegB], _data[RegD]) = (0x26, Hours24, Valid);
        _baseAtNs = (ulong)NowNs;
        _baseSeconds = _baseAtNs / (ulong)SecondNs;
        _offsetNs = (long)_baseAtNs % SecondNs;
        WriteMemorySize();
        ShowTime();
    }

    private long NowNs => (_time.GetUtcNow() - DateTimeOffset.UnixEpoch).Ticks * TimeSpan.NanosecondsPerTick;

    private long GuestNs => (long)_baseSeconds * SecondNs + NowNs - (long)_baseAtNs + _offsetNs;

    private bool IsSet => (_data[RegB] & Set) != 0;

    /// <summary>Switches the interrupts off; time and memory stay.</summary>
    public void Reset()
    {
        _data[RegB] &= unchecked((byte)~(PeriodicEnable | AlarmEnable | UpdateEnable));
        _data[RegC] = 0;
        _irqs.Set(Irq, false);
        Arm();
    }

    /// <inheritdoc/>
    public void OnVmStateChange(bool running, RunState state)
    {
        if (running) Arm();
    }

    /// <inheritdoc/>
    public ulong Read(ulong offset, int size) => offset == 0 ? 0xffu : ReadRegister();

    /// <inheritdoc/>
    public void Write(ulong offset, int size, ulong value)
    {
        if (offset == 0) _index = (byte)(value & 0x7f);
        else WriteRegister((byte)value);
    }

    /// <summary>Stops the timer.</summary>
    public void Dispose() => _timer.Dispose();

    private byte ReadRegister()
    {
        switch (_index)
        {
            case < RegA or CenturyIndex:
                ShowTime();
                return _data[_index];
            case RegA:
                bool updates = !IsSet && GuestNs % SecondNs >= SecondNs - UpdateNs;
                return (byte)(_data[RegA] | (updates ? InProgress : 0));
            case RegC:
                byte flags = _data[RegC];
                _data[RegC] = 0;
                _irqs.Set(Irq, false);
                return flags;
            default:
                return _data[_index];
        }
    }

    private void WriteRegister(byte value)
    {
        switch (_index)
        {
            case 1 or 3 or 5:
                _data[_index] = value;
                Arm();
                break;
            case < RegA or CenturyIndex:
                ShowTime();
                _data[_index] = value;
                TakeTime();
                break;
            case RegA:
                _data[RegA] = (byte)(value & ~InProgress);
                Arm();
                break;
            case RegB:
                ShowTime();
                bool wasSet = IsSet;
                _data[RegB] = value;
                if (wasSet && !IsSet) TakeTime();
                Arm();
                break;
            case RegC or RegD:
                break;
            default:
                _data[_index] = value;
                break;
        }
    }

    /// <summary>Writes the present time into the registers, unless the guest is setting them.</summary>
    private void ShowTime()
    {
        if (IsSet) return;
        DateTimeOffset now = DateTimeOffset.UnixEpoch.AddTicks(GuestNs / TimeSpan.NanosecondsPerTick);
        int hour = now.Hour;
        byte hours = (_data[RegB] & Hours24) != 0 ? Code(hour) : (byte)(Code(hour % 12 == 0 ? 12 : hour % 12) | (hour >= 12 ? AfterNoon : 0));
        (_data[0], _data[2], _data[4], _data[6]) = (Code(now.Second), Code(now.Minute), hours, Code((int)now.DayOfWeek + 1));
        (_data[7], _data[8], _data[9], _data[CenturyIndex]) = (Code(now.Day), Code(now.Month), Code(now.Year % 100), Code(now.Year / 100));
    }

    /// <summary>Sets the clock to the time that the guest wrote; ignores values that are not a date.</summary>
    private void TakeTime()
    {
        if (IsSet) return;
        int year = Value(_data[CenturyIndex]) * 100 + Value(_data[9]), month = Value(_data[8]), day = Value(_data[7]);
        int hour = Hour(_data[4]), minute = Value(_data[2]), second = Value(_data[0]);
        if (year is < 1970 or > 2261 || month is < 1 or > 12 || day < 1 || day > DateTime.DaysInMonth(year, month) || hour > 23 || minute > 59 || second > 59) return;
        var time = new DateTimeOffset(year, month, day, hour, minute, second, TimeSpan.Zero);
        (_baseSeconds, _baseAtNs, _offsetNs) = ((ulong)time.ToUnixTimeSeconds(), (ulong)NowNs, 0);
        Arm();
    }

    /// <summary>Sets the timer to the next event: the end of the second while an alarm or update interrupt is enabled, or the end of the period.</summary>
    private void Arm()
    {
        long now = NowNs;
        bool wantsSeconds = !IsSet && (_data[RegB] & (AlarmEnable | UpdateEnable)) != 0;
        _updateNs = wantsSeconds ? now + SecondNs - GuestNs % SecondNs : -1;
        int rate = _data[RegA] & 0x0f;
        // The chip has the same period for rate 1 as for rate 8, and for 2 as for 9.
        _period = rate == 0 || (_data[RegB] & PeriodicEnable) == 0 ? 0 : 1u << (rate <= 2 ? rate + 6 : rate - 1);
        long periodNs = _period * SecondNs / CrystalHz;
        if (_period == 0) _periodicNs = -1;
        else if (_periodicNs < 0 || _periodicNs > now + periodNs) _periodicNs = now + periodNs;
        _nextPeriodicNs = Math.Max(_periodicNs, 0);
        long next = Math.Min(_updateNs < 0 ? long.MaxValue : _updateNs, _periodicNs < 0 ? long.MaxValue : _periodicNs);
        if (next == long.MaxValue) _timer.Del();
        else _timer.Mod(_clock.NowNs + Math.Max(next - now, 0));
    }

    private void OnTimer()
    {
        long now = NowNs;
        byte flags = 0;
        if (_periodicNs >= 0 && now >= _periodicNs)
        {
            flags |= PeriodicFlag;
            _periodicNs = -1; // A late tick does not shorten the next period.
        }
        if (_updateNs >= 0 && now >= _updateNs)
        {
            ShowTime();
            flags |= UpdateFlag;
            if (Matches(1, 0) && Matches(3, 2) && Matches(5, 4)) flags |= AlarmFlag;
        }
        _data[RegC] |= flags;
        if ((_data[RegC] & _data[RegB] & (PeriodicFlag | AlarmFlag | UpdateFlag)) != 0)
        {
            _data[RegC] |= Pending;
            _irqs.Set(Irq, true);
        }
        Arm();
    }

    private bool Matches(int alarm, int time) => (_data[alarm] & AnyAlarm) == AnyAlarm || _data[alarm] == _data[time];

    private void AfterLoad()
    {
        _index &= 0x7f;
        // The RAM size comes from this machine, not from the stream. The interrupt controllers load the level of the line themselves.
        WriteMemorySize();
    }

    private byte Code(int value) => (_data[RegB] & Binary) != 0 ? (byte)value : (byte)(value / 10 << 4 | value % 10);

    private int Value(byte code) => (_data[RegB] & Binary) != 0 ? code : (code >> 4) * 10 + (code & 0xf);

    private int Hour(byte code) => (_data[RegB] & Hours24) != 0 ? Value(code) : Value((byte)(code & 0x7f)) % 12 + ((code & AfterNoon) != 0 ? 12 : 0);

    private void WriteMemorySize()
    {
        ulong extendedKiB = Math.Min(_memoryBytes > 1 << 20 ? (_memoryBytes - (1 << 20)) >> 10 : 0, ushort.MaxValue);
        Word(ExtendedLow, extendedKiB);
        Word(ExtendedCopyLow, extendedKiB);
        Word(Above16MiBLow, Math.Min(_memoryBytes > 16 << 20 ? (_memoryBytes - (16 << 20)) >> 16 : 0, ushort.MaxValue));
    }

    private void Word(int at, ulong value) => (_data[at], _data[at + 1]) = ((byte)value, (byte)(value >> 8));
}
