using Vmm.Core.RunStates;
using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>A scratch register and a count of the VM's starts; the example of ADDING-A-DEVICE.md.</summary>
internal sealed class ScratchDevice : IVmDevice, IVmStateHandler
{
    /// <summary>State of the device; version 2 added the count of starts.</summary>
    public static VmStateDescription<ScratchDevice> Description { get; } = new()
    {
        Name = "scratch", VersionId = 2, MinimumVersionId = 1,
        Fields =
        [
            VmState.UInt32<ScratchDevice>("value", static d => ref d._value),
            VmState.Bool<ScratchDevice>("locked", static d => ref d._locked),
            VmState.UInt64<ScratchDevice>("starts", static d => ref d._starts, since: 2),
        ],
        PostLoad = static (d, version) => d._starts = version < 2 ? 1 : d._starts,
    };

    // Registrations with the VM.
    private readonly IDisposable _section, _handler;

    // Guest-visible state.
    private uint _value;
    private bool _locked;
    private ulong _starts;

    /// <summary>Makes and registers the device. BQL: held.</summary>
    /// <param name="options">Reads the option <c>id</c>.</param>
    /// <param name="services">Services of the device's VM.</param>
    public ScratchDevice(DeviceOptions options, IDeviceServices services)
    {
        ArgumentNullException.ThrowIfNull(options);
        Id = options.Id;
        _section = services.RegisterVmState(Description, this);
        _handler = services.RunState.Register(this);
    }

    /// <inheritdoc/>
    public string Id { get; }

    /// <summary>Number of starts of the VM. BQL: held.</summary>
    public ulong Starts => _starts;

    /// <summary>The register; writes are ignored while it is locked. BQL: held.</summary>
    public uint Value
    {
        get => _value;
        set => _value = _locked ? _value : value;
    }

    /// <summary>Makes the register read-only until the next reset. BQL: held.</summary>
    public void Lock() => _locked = true;

    /// <inheritdoc/>
    public void OnVmStateChange(bool running, RunState state) => _starts += running ? 1UL : 0;

    /// <inheritdoc/>
    public void Reset() => (_value, _locked, _starts) = (0, false, 0);

    /// <inheritdoc/>
    public void Dispose()
    {
        _handler.Dispose();
        _section.Dispose();
    }
}

/// <summary>Makes <see cref="ScratchDevice"/>s.</summary>
internal sealed class ScratchDeviceFactory : IDeviceFactory
{
    /// <inheritdoc/>
    public string TypeName => "scratch";

    /// <inheritdoc/>
    public string Summary => "a register that migrates; an example";

    /// <inheritdoc/>
    public IReadOnlyList<IVmStateDescription> Descriptions => [ScratchDevice.Description];

    /// <inheritdoc/>
    public IVmDevice Create(DeviceOptions options, IDeviceServices services) => new ScratchDevice(options, services);
}
