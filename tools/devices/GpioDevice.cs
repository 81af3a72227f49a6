using System.Buffers.Binary;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Tools.Devices;

/// <summary>
/// A PCI-IDIO-16 GPIO card with the same bytes as libvfio-user's sample (vfio-user 15). BAR2 has 256 ports: each bit written to byte 0 or 4 counts its
/// pin; bytes 1 and 5 have a bit set if a pin's count is divisible by 3. Linux has a driver for it. As in the sample, the state is 16 counters as i32
/// without framing; the device sends it once, and again after a change.
/// </summary>
public sealed class GpioDevice(bool hasP2P = false) : IVfioUserBackend
{
    private const uint Bar2 = 2;
    private const int Pins = 16, Bar2Bytes = 256, StateBytes = Pins * 4;

    // Guest-visible state. Only the session's thread accesses it.
    private readonly int[] _counts = new int[Pins];
    private VfioUserPciConfig _config = null!;
    private VfioUserHost _host = null!;
    private Session? _session;

    public string TypeName => "gpio-pci-idio-16";

    public IReadOnlyList<VfioUserRegion> Regions { get; } =
        [new() { Index = Bar2, SizeBytes = Bar2Bytes }, new() { Index = VfioPciRegion.Config, SizeBytes = VfioUserPciConfig.Length }];

    public VfioMigrationFlags MigrationFlags => VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy | (hasP2P ? VfioMigrationFlags.P2P : 0);

    public uint GetIrqCount(uint index) => index == VfioPciIrq.Intx ? 1u : 0;

    public void Realize(VfioUserHost host)
    {
        ArgumentNullException.ThrowIfNull(host);
        _host = host;
        _config = new VfioUserPciConfig(host.Dma, 0x494f, 0x0dc8, 0, hasIntx: true);
        _config.SetSubsystem(0, 0);
        _config.AddIoBar((int)Bar2, Bar2Bytes);
    }

    public void RegionRead(uint index, ulong offset, Span<byte> destination)
    {
        if (index != Bar2) _config.Read(offset, destination);
        else for (int i = 0; i < destination.Length; i++) destination[i] = (offset + (uint)i) switch { 1 => Levels(0), 5 => Levels(8), _ => 0 };
    }

    public void RegionWrite(uint index, ulong offset, ReadOnlySpan<byte> source)
    {
        if (index != Bar2) _config.Write(offset, source);
        else for (int i = 0; i < source.Length; i++) if ((offset + (uint)i) is 0 or 4) Count(offset + (uint)i == 0 ? 0 : 8, source[i]);
    }

    public ValueTask<Errno> Quiesce() => ValueTask.FromResult(Errno.None);

    public void Unquiesce()
    {
    }

    public ValueTask<Errno> Reset(VfioUserResetReason reason)
    {
        Array.Clear(_counts);
        _config.Reset();
        _host.Irqs.ClearPending();
        return ValueTask.FromResult(Errno.None);
    }

    public void ClientLost()
    {
    }

    public ulong? EstimateStateBytes() => StateBytes;

    public ValueTask<Errno> Transition(VfioDeviceState from, VfioDeviceState to) => ValueTask.FromResult(Errno.None);

    public IVfioUserSave OpenSave() => _session = new Session(this, null);

    public IVfioUserLoad OpenLoad() => _session = new Session(this, []);

    public void Dispose()
    {
    }

    private byte Levels(int first)
    {
        int levels = 0;
        for (int pin = 0; pin < 8; pin++) levels |= _counts[first + pin] % 3 == 0 ? 1 << pin : 0;
        return (byte)levels;
    }

    private void Count(int first, byte bits)
    {
        for (int pin = 0; pin < 8; pin++) if ((bits >> pin & 1) != 0) unchecked { _counts[first + pin]++; }
        _session?.MarkChanged();
    }

    private byte[] Save()
    {
        byte[] state = new byte[StateBytes];
        for (int pin = 0; pin < Pins; pin++) BinaryPrimitives.WriteInt32LittleEndian(state.AsSpan(4 * pin), _counts[pin]);
        return state;
    }

    /// <summary>One attempt to save or to load. A stream consists of whole states, of which the last one counts.</summary>
    private sealed class Session(GpioDevice device, List<byte>? incoming) : IVfioUserSave, IVfioUserLoad
    {
        private bool _isChanged = true, _hasState;
        private byte[] _state = [];
        private int _at;

        public void MarkChanged() => _isChanged = true;

        public void StopCopy()
        {
        }

        public int ReadState(Span<byte> destination, out Errno errno)
        {
            errno = Errno.None;
            if (_at == _state.Length && _isChanged) (_state, _at, _isChanged) = (device.Save(), 0, false);
            int n = Math.Min(destination.Length, _state.Length - _at);
            _state.AsSpan(_at, n).CopyTo(destination);
            _at += n;
            return n;
        }

        public bool TryTake(int count, out ReadOnlyMemory<byte> bytes)
        {
            bytes = default;
            return false;
        }

        public Errno WriteState(ReadOnlySpan<byte> source)
        {
            foreach (byte one in source)
            {
                incoming!.Add(one);
                if (incoming.Count < StateBytes) continue;
                (_state, _hasState) = ([.. incoming], true);
                incoming.Clear();
            }
            return Errno.None;
        }

        public ValueTask<Errno> Commit()
        {
            if (!_hasState || incoming!.Count > 0) return ValueTask.FromResult(Errno.EINVAL);
            for (int pin = 0; pin < Pins; pin++) device._counts[pin] = BinaryPrimitives.ReadInt32LittleEndian(_state.AsSpan(4 * pin));
            return ValueTask.FromResult(Errno.None);
        }

        public void Dispose()
        {
            if (ReferenceEquals(device._session, this)) device._session = null;
        }
    }
}

/// <summary><c>gpio-pci-idio-16,p2p=on|off</c>.</summary>
public sealed class GpioType : IVfioUserDeviceType
{
    public string TypeName => "gpio-pci-idio-16";

    public string Summary => "A GPIO card with 16 pins that Linux has a driver for; same bytes as libvfio-user's sample";

    public IVfioUserBackend Create(DeviceOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        var device = new GpioDevice(options.GetBool("p2p", false));
        options.ThrowIfUnused();
        return device;
    }
}
