using System.Text;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Migration.Attempts;

/// <summary>
/// The <c>globalstate</c> section of one attempt: the run state before the stop (stream 10.2; QEMU: <c>vmstate_globalstate</c>).
/// Layout, 104 bytes: u32 strlen+1, 32 bytes of name, u8 has_vm_was_suspended, u8 vm_was_suspended, 66 zero bytes.
/// </summary>
internal sealed class GlobalState(MigrationCompat compat) : IVmStateSection
{
    internal const string IdStr = "globalstate";

    private const int NameBytes = 32, PaddingBytes = 66;
    private RunState _state = RunState.PreLaunch;
    private bool _wasSuspended;

    public string Name => IdStr;

    public int VersionId => 1;

    public int MinimumVersionId => 1;

    public bool IsEarlySetup => false;

    public bool IsMigratable => true;

    /// <summary>The source's run state; null when the stream had no such section.</summary>
    internal RunState? Received { get; private set; }

    /// <summary>The source's suspended mark.</summary>
    internal bool ReceivedWasSuspended { get; private set; }

    /// <summary>Sets the run state to send (QEMU: <c>global_state_store</c>). BQL: held.</summary>
    internal void Store(RunState state, bool wasSuspended) => (_state, _wasSuspended) = (state, wasSuspended);

    public bool IsNeeded() => compat.StoreGlobalState;

    public void Save(QemuFileWriter f, VmDescJson? desc)
    {
        string text = _state.ToWireName();
        f.WriteUInt32((uint)text.Length + 1);
        Span<byte> name = stackalloc byte[NameBytes];
        name.Clear();
        Encoding.ASCII.GetBytes(text, name);
        f.Write(name);
        f.WriteBool(!compat.LegacyDescriptions);
        f.WriteBool(!compat.LegacyDescriptions && _wasSuspended);
        f.WriteZeros(PaddingBytes);
        if (desc is not null) Describe(desc);
    }

    public void Load(QemuFileReader f, int versionId)
    {
        f.ReadUInt32(); // strlen + 1; QEMU ignores the value on load.
        long at = f.Position;
        Span<byte> name = stackalloc byte[NameBytes];
        f.Read(name);
        bool hasMark = f.ReadBool();
        bool mark = f.ReadBool();
        f.Skip(PaddingBytes);
        int end = name.IndexOf((byte)0);
        string text = Encoding.Latin1.GetString(end < 0 ? name : name[..end]);
        if (!RunStateNames.TryParse(text, out RunState state)) throw f.Bad("run state", "the name of one", $"'{text}'", at);
        Received = state;
        ReceivedWasSuspended = hasMark && mark;
    }

    private void Describe(VmDescJson desc)
    {
        desc.Member("vmsd_name", Name);
        desc.Member("version", VersionId);
        desc.StartArray("fields");
        Field(desc, "size", "uint32", 4);
        if (compat.LegacyDescriptions)
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

    private static void Field(VmDescJson desc, string name, string type, int size)
    {
        desc.StartObject();
        desc.Member("name", name);
        desc.Member("type", type);
        desc.Member("size", size);
        desc.EndObject();
    }
}
