using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.VmStates;
using Vmm.Core.Wire;

namespace Vmm.Tests.Fakes;

/// <summary>
/// A PCI function that plays several roles beside its declared section: it writes a section of unknown size by code, and it owns a resource
/// while the VM runs. BAR 0 holds the MSI-X structures.
/// </summary>
internal sealed class RolePciDevice : PciDevice, IVmDevice, ISaveState, ILoadSetup, ILoadState, IVmStateHandler
{
    private static readonly VmStateDescription<RolePciDevice> s_description = new()
    {
        Name = "role",
        Fields =
        [
            VmState.Struct<RolePciDevice, PciDevice>("parent_obj", PciState, static d => d),
            VmState.Struct<RolePciDevice, PciDevice>("msix", MsixState, static d => d),
            VmState.UInt32<RolePciDevice>("value", static d => ref d._value),
        ],
    };

    private readonly List<IDisposable> _registrations = [];
    private readonly Behaviour _behaviour;
    private uint _value;

    internal RolePciDevice(DeviceOptions options, IDeviceServices services, Behaviour behaviour)
        : base(services.Pci, new PciDeviceOptions { Id = options.Id })
    {
        _behaviour = behaviour;
        behaviour.Made.Add(this);
        Config.SetUInt32(0, 0x4321_1af4);
        Config.Bytes[PciRegisters.InterruptPin] = 1;
        RegisterBar(0, PciBarType.Memory32, 0x2000);
        AddMsix(0x40, new MsixLayout(12, 0, 0x1000, 0, 0x1800));
        _registrations.Add(services.RegisterVmState(s_description, this, path: Path));
        _registrations.Add(services.SaveVm.Register(new SaveVmRegistration { IdStr = "role-bulk", VersionId = 3 }, SaveVmHandlers.Of(this)));
        _registrations.Add(services.RunState.Register(this));
        _registrations.Add(services.Notifiers.Add(e => { lock (behaviour.Log) behaviour.Log.Add(e.ToString()); }));
    }

    /// <summary>Settings and records that a test shares with all devices that it creates.</summary>
    internal sealed class Behaviour
    {
        internal List<RolePciDevice> Made { get; } = [];
        internal int BulkBytes { get; init; } = 1000;
        internal long Written;
        internal bool FailAcquire { get; set; }
        internal bool FailSave { get; set; }
        internal List<string> Log { get; } = [];
    }

    internal bool Owns { get; private set; }

    internal long Loaded { get; private set; }

    public void OnVmStateChange(bool running, RunState state)
    {
        if (running && _behaviour.FailAcquire) throw new DeviceStateException("the other side has it");
        Owns = running;
        lock (_behaviour.Log) _behaviour.Log.Add(running ? "acquire" : "drain and flush");
    }

    public void SaveState(QemuFileWriter f)
    {
        Span<byte> block = stackalloc byte[1000];
        for (int left = _behaviour.BulkBytes; left > 0; left -= block.Length)
        {
            if (_behaviour.FailSave && left < _behaviour.BulkBytes / 2) throw new DeviceStateException("the medium failed") { };
            block.Fill((byte)left);
            f.WriteByte(1);
            f.Write(block[..Math.Min(left, block.Length)]);
            Interlocked.Add(ref _behaviour.Written, block.Length);
        }
        f.WriteByte(0);
    }

    public LoadRoles LoadSetup(LoadContext context)
    {
        Loaded = 0;
        return LoadRoles.Of(this);
    }

    public void LoadState(QemuFileReader f, int versionId)
    {
        Span<byte> block = stackalloc byte[1000];
        while (f.ReadBool())
        {
            int n = (int)Math.Min(block.Length, _behaviour.BulkBytes - Loaded);
            f.Read(block[..n]);
            Loaded += n;
        }
    }

    public override void Reset()
    {
        base.Reset();
        _value = 0;
    }

    internal void Raise(int vector)
    {
        using (Host.Bql.Acquire()) Msix!.Notify(vector);
    }

    protected override ulong BarRead(int bar, ulong offset, int size) => offset == 0 ? _value : 0;

    protected override void BarWrite(int bar, ulong offset, int size, ulong value)
    {
        if (offset == 0) _value = (uint)value;
    }

    protected override void Dispose(bool disposing)
    {
        _registrations.ForEach(static r => r.Dispose());
        base.Dispose(disposing);
    }

    internal sealed class Factory(Behaviour behaviour) : IDeviceFactory
    {
        public string TypeName => "role";

        public string Summary => "a test device";

        public IReadOnlyList<IVmStateDescription> Descriptions => [s_description];

        public IVmDevice Create(DeviceOptions options, IDeviceServices services) => new RolePciDevice(options, services, behaviour);
    }
}
