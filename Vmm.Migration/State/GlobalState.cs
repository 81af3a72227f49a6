using System.Text;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Migration.State;

/// <summary>
/// The <c>globalstate</c> section: the run state before the migration stopped the VM (spec 10.2; QEMU: <c>vmstate_globalstate</c>).
/// Layout, 104 bytes: u32 strlen+1, 32 bytes of name, u8 has_vm_was_suspended, u8 vm_was_suspended, 66 zero bytes.
/// </summary>
internal sealed class GlobalState : IMachineComponent, IVmStateSection
{
    private const int NameBytes = 32, PaddingBytes = 66;
    private IDisposable? _registration;
    private string _name = RunState.PreLaunch.ToWireName();
    private bool _wasSuspended;

    public MachinePhase Phase => MachinePhase.AfterDevices;

    public string Name => "globalstate";

    public int VersionId => 1;

    public int MinimumVersionId => 1;

    public bool IsEarlySetup => false;

    public bool IsMigratable => true;

    /// <summary>Framing choices of the migration under way.</summary>
    internal MigrationCompat Compat { get; set; } = new();

    /// <summary>The run state that a load delivered; null when the section was missing.</summary>
    internal RunState? Received { get; private set; }

    /// <summary>The suspended mark that a load delivered.</summary>
    internal bool ReceivedWasSuspended { get; private set; }

    public void Attach(IDeviceServices services) =>
        _registration = services.SaveVm.Register(new SaveVmRegistration { IdStr = Name, InstanceId = 0 }, this);

    /// <summary>Takes down the run state to send (QEMU: <c>global_state_store</c>). BQL: held.</summary>
    internal void Store(RunState state, bool wasSuspended)
    {
        _name = state.ToWireName();
        _wasSuspended = wasSuspended;
    }

    /// <summary>Forgets what an earlier load delivered.</summary>
    internal void ClearReceived()
    {
        Received = null;
        ReceivedWasSuspended = false;
    }

    public bool IsNeeded() => Compat.StoreGlobalState;

    public void Save(QemuFileWriter f, VmDescJson? desc)
    {
        f.WriteUInt32((uint)_name.Length + 1);
        Span<byte> name = stackalloc byte[NameBytes];
        name.Clear();
        Encoding.ASCII.GetBytes(_name, name);
        f.Write(name);
        f.WriteBool(!Compat.LegacyDescriptions);
        f.WriteBool(!Compat.LegacyDescriptions && _wasSuspended);
        f.WriteZeros(PaddingBytes);
        if (desc is null) return;
        desc.Member("vmsd_name", Name);
        desc.Member("version", VersionId);
        desc.StartArray("fields");
        Field(desc, "size", "uint32", 4);
        if (Compat.LegacyDescriptions)
        {
            Field(desc, "runstate", "buffer", NameBytes + 2 + PaddingBytes);
        }
        else
        {
            Field(desc, "runstate", "buffer", NameBytes);
            Field(desc, "has_vm_was_suspended", "uint8", 1);
            Field(desc, "vm_was_suspended", "uint8", 1);
            Field(desc, "unused", "buffer", PaddingBytes);
        }
        desc.EndArray();
    }

    public void Load(QemuFileReader f, int versionId)
    {
        f.ReadUInt32(); // strlen + 1; QEMU ignores the value on load.
        Span<byte> name = stackalloc byte[NameBytes];
        f.Read(name);
        bool hasMark = f.ReadBool();
        bool mark = f.ReadBool();
        f.Skip(PaddingBytes);
        int end = name.IndexOf((byte)0);
        string text = Encoding.Latin1.GetString(end < 0 ? name : name[..end]);
        if (!RunStateNames.TryParse(text, out RunState state)) throw f.Bad("run state", "a run state name", $"'{text}'");
        Received = state;
        ReceivedWasSuspended = hasMark && mark;
    }

    public void Dispose() => _registration?.Dispose();

    private static void Field(VmDescJson desc, string name, string type, int size)
    {
        desc.StartObject();
        desc.Member("name", name);
        desc.Member("type", type);
        desc.Member("size", size);
        desc.EndObject();
    }
}
