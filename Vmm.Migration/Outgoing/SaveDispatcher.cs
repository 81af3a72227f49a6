using System.Text;
using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Threading;
using Vmm.Core.Wire;
using Vmm.Migration.Multifd;
using Vmm.Migration.State;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// Writes the framing around what handlers write, in the order of spec 1.3, and takes the BQL as each role demands. One thread.
/// </summary>
/// <param name="vm">The machine.</param>
/// <param name="f">The stream.</param>
/// <param name="compat">Framing choices.</param>
/// <param name="sendUuid">Capability validate-uuid.</param>
internal sealed class SaveDispatcher(MachineView vm, QemuFileWriter f, MigrationCompat compat, bool sendUuid)
{
    private readonly List<SaveVmEntry> _prepared = [];
    private readonly List<Task> _threads = [];
    private readonly VmDescJson _devices = new(compat.LegacyDescriptions ? VmDescOptions.Qemu72 : VmDescOptions.Qemu111);

    /// <summary>What is being saved, for error records.</summary>
    internal string? Section { get; private set; }

    private Bql Bql => vm.Bql;

    /// <summary>Header and configuration (spec 1.1, 1.2).</summary>
    internal void WriteHeader()
    {
        f.WriteUInt32(StreamConstants.Magic);
        f.WriteUInt32(StreamConstants.Version);
        if (!compat.SendConfiguration) return;
        f.WriteByte((byte)SectionType.Configuration);
        f.WriteUInt32((uint)vm.Machine.Length);
        f.Write(Encoding.ASCII.GetBytes(vm.Machine));
        if (!SendsUuid) return;
        f.WriteByte((byte)SectionType.Subsection);
        f.WriteCountedString("configuration/uuid");
        f.WriteUInt32(1);
        f.Write(vm.Uuid.ToByteArray(bigEndian: true));
    }

    internal void WriteCommand(MigCommand command, ReadOnlySpan<byte> payload = default)
    {
        f.WriteByte((byte)SectionType.Command);
        f.WriteUInt16((ushort)command);
        f.WriteUInt16((ushort)payload.Length);
        f.Write(payload);
    }

    /// <summary>Lets every handler veto (QEMU: <c>qemu_savevm_state_prepare</c>). BQL: held.</summary>
    internal void Prepare()
    {
        Bql.AssertHeld();
        foreach (SaveVmEntry entry in vm.SaveVm.Entries())
        {
            if (entry.VmState is { IsMigratable: false }) throw new MigrationBlockedException($"device '{entry.IdStr}' is not migratable");
            if (entry.Handlers is null || entry.Handlers.IsActive is { } active && !active()) continue;
            _prepared.Add(entry);
            Guard(entry, () => entry.Handlers.Setup?.SavePrepare());
        }
    }

    /// <summary>Early FULL sections, then the START section of every iterable (QEMU: <c>qemu_savevm_state_setup</c>). BQL: held.</summary>
    internal void Setup(CancellationToken cancel)
    {
        Bql.AssertHeld();
        foreach (SaveVmEntry entry in vm.SaveVm.Entries())
            if (entry.VmState is { IsEarlySetup: true }) WriteFull(entry);
        foreach (SaveVmEntry entry in Iterables())
        {
            WriteSectionHeader(entry, SectionType.Start);
            Guard(entry, () => entry.Handlers!.Setup?.SaveSetup(f, cancel));
            WriteFooter(entry);
        }
    }

    internal PendingBytes Estimate() => Sum(static live => live.EstimatePending());

    /// <summary>After a synchronisation. Takes the BQL.</summary>
    internal PendingBytes Exact()
    {
        using (Bql.Acquire()) return Sum(static live => live.ExactPending());
    }

    /// <summary>One PART section of every iterable that has something to send (QEMU: <c>qemu_savevm_state_iterate</c>). BQL: not held.</summary>
    internal SaveProgress Iterate(IterateBudget budget)
    {
        SaveProgress all = SaveProgress.Done;
        foreach (SaveVmEntry entry in Iterables())
        {
            if (entry.Handlers!.Live is not { IsActiveIterate: true } live) continue;
            WriteShortHeader(entry, SectionType.Part);
            SaveProgress one = SaveProgress.Done;
            Guard(entry, () => one = live.SaveLiveIterate(f, budget));
            WriteFooter(entry);
            // Strict priority, as in QEMU: a handler that has more to send keeps later ones waiting.
            if (one == SaveProgress.More) return SaveProgress.More;
            all = one;
        }
        return all;
    }

    /// <summary>END sections (QEMU: <c>qemu_savevm_state_complete_precopy_iterable</c>). BQL: held.</summary>
    internal void CompleteIterables()
    {
        Bql.AssertHeld();
        foreach (SaveVmEntry entry in Iterables())
        {
            WriteShortHeader(entry, SectionType.End);
            Guard(entry, () => entry.Handlers!.Live?.SaveLiveCompletePrecopy(f));
            WriteFooter(entry);
        }
    }

    /// <summary>
    /// FULL sections (QEMU: <c>qemu_savevm_state_complete_precopy_non_iterable</c>). An iterable may have one too, as VFIO's config. BQL: held.
    /// </summary>
    internal void WriteDeviceState(bool withIterables = true)
    {
        Bql.AssertHeld();
        foreach (SaveVmEntry entry in vm.SaveVm.Entries())
            if (entry.VmState is { IsEarlySetup: false } || (entry.Handlers is { State: not null } h && (withIterables || !h.IsIterable))) WriteFull(entry);
    }

    /// <summary>Tells devices whether the destination acknowledges first data. BQL: held.</summary>
    internal void EnableSwitchoverAck(bool on)
    {
        foreach (SaveVmEntry entry in Iterables())
            if (entry.Handlers!.SwitchoverAck is { } ack) ack.SwitchoverAckEnabled = on;
    }

    /// <summary>Acknowledgements that devices have begun to wait for since the last call.</summary>
    internal int TakeSwitchoverAckRequests()
    {
        int n = 0;
        foreach (SaveVmEntry entry in Iterables()) n += entry.Handlers!.SwitchoverAck?.TakeSwitchoverAckRequests() ?? 0;
        return n;
    }

    /// <summary>Some device sends its final state over data channels.</summary>
    internal bool UsesThreads => Iterables().Any(static e => e.Handlers!.CompleteThread is { UsesCompleteThread: true });

    /// <summary>Tells devices whether there are channels for their final state. BQL: held.</summary>
    internal void EnableThreads(bool on)
    {
        foreach (SaveVmEntry entry in vm.SaveVm.Entries())
            if (entry.Handlers?.CompleteThread is { } thread) thread.UsesCompleteThread = on;
    }

    /// <summary>One thread for each device that sends its final state over data channels (QEMU: <c>save_complete_precopy_thread</c>).</summary>
    internal void StartThreads(MultifdSender sender, FaultLatch latch, CancellationToken cancel)
    {
        foreach (SaveVmEntry entry in Iterables())
        {
            if (entry.Handlers!.CompleteThread is not { UsesCompleteThread: true } thread) continue;
            _threads.Add(WorkerThread.Run($"mig/src/save_{entry.IdStr}", () =>
            {
                try
                {
                    thread.SaveLiveCompletePrecopyThread(new StateSink(sender, entry), cancel);
                }
#pragma warning disable CA1031 // The migration's reason, which whoever joins asks the latch for.
                catch (Exception e)
#pragma warning restore CA1031
                {
                    latch.Set(e);
                }
            }));
        }
    }

    /// <summary>Waits for the devices' threads, which end early once the latch is set.</summary>
    internal void JoinThreads()
    {
        Task.WaitAll([.. _threads]);
        _threads.Clear();
    }

    /// <summary>EOF and VMDESC (spec 1.6).</summary>
    internal void WriteEnd()
    {
        f.WriteByte((byte)SectionType.Eof);
        if (compat.SuppressVmDesc) return;
        byte[] json = Description().ToBytes();
        f.WriteByte((byte)SectionType.VmDescription);
        f.WriteUInt32((uint)json.Length);
        f.Write(json);
    }

    /// <summary>Ends every handler's part, whatever happened (QEMU: <c>qemu_savevm_state_cleanup</c>). Takes the BQL.</summary>
    internal void Cleanup()
    {
        using (Bql.Acquire())
        {
            foreach (SaveVmEntry entry in _prepared) entry.Handlers!.Setup?.SaveCleanup();
            EnableThreads(false);
        }
        _prepared.Clear();
    }

    private sealed class StateSink(MultifdSender sender, SaveVmEntry entry) : IDeviceStateSink
    {
        public void Send(ReadOnlySpan<byte> buffer) => sender.SendState(entry, buffer);
    }

    private bool SendsUuid => sendUuid && vm.Uuid != Guid.Empty;

    private IEnumerable<SaveVmEntry> Iterables() =>
        vm.SaveVm.Entries().Where(static e => e.Handlers is { IsIterable: true } h && (h.IsActive?.Invoke() ?? true));

    private PendingBytes Sum(Func<ISaveLive, PendingBytes> query)
    {
        PendingBytes sum = default;
        foreach (SaveVmEntry entry in Iterables())
            if (entry.Handlers!.Live is { } live) sum += query(live);
        return sum;
    }

    private void WriteFull(SaveVmEntry entry)
    {
        if (entry.VmState is { } state && !state.IsNeeded()) return;
        if (entry.Handlers?.IsActive is { } active && !active()) return;
        WriteSectionHeader(entry, SectionType.Full);
        _devices.StartObject();
        _devices.Member("name", entry.IdStr);
        _devices.Member("instance_id", entry.InstanceId);
        Guard(entry, () =>
        {
            if (entry.VmState is { } vmState)
            {
                vmState.Save(f, _devices);
                return;
            }
            long start = f.Position;
            entry.Handlers!.State!.SaveState(f);
            _devices.Member("size", f.Position - start);
            _devices.StartArray("fields");
            _devices.StartObject();
            _devices.Member("name", "data");
            _devices.Member("size", f.Position - start);
            _devices.Member("type", "buffer");
            _devices.EndObject();
            _devices.EndArray();
        });
        _devices.EndObject();
        WriteFooter(entry);
    }

    private void WriteSectionHeader(SaveVmEntry entry, SectionType type)
    {
        WriteShortHeader(entry, type);
        f.WriteCountedString(entry.IdStr);
        f.WriteUInt32((uint)entry.InstanceId);
        f.WriteUInt32((uint)entry.VersionId);
    }

    private void WriteShortHeader(SaveVmEntry entry, SectionType type)
    {
        Section = entry.ToString();
        f.WriteByte((byte)type);
        f.WriteUInt32(entry.SectionId);
    }

    private void WriteFooter(SaveVmEntry entry)
    {
        if (compat.SendSectionFooter)
        {
            f.WriteByte((byte)SectionType.Footer);
            f.WriteUInt32(entry.SectionId);
        }
        Section = null;
    }

    private void Guard(SaveVmEntry entry, Action body)
    {
        Section = entry.ToString();
        try
        {
            body();
        }
        catch (Exception e) when (e is not (VmmException or OperationCanceledException))
        {
            throw new DeviceStateException($"device '{entry.IdStr}' failed to save: {e.Message}", e);
        }
    }

    private VmDescJson Description()
    {
        var json = new VmDescJson();
        json.StartObject();
        if (compat is { LegacyDescriptions: false, SendConfiguration: true })
        {
            json.StartObject("configuration");
            json.Member("vmsd_name", "configuration");
            json.Member("version", 1);
            json.StartArray("fields");
            Field(json, "len", "uint32", 4);
            Field(json, "name", "buffer", vm.Machine.Length);
            json.EndArray();
            if (SendsUuid)
            {
                json.StartArray("subsections");
                json.StartObject();
                json.Member("vmsd_name", "configuration/uuid");
                json.Member("version", 1);
                json.StartArray("fields");
                Field(json, "uuid.data", "uint8", 1, arrayLength: 16);
                json.EndArray();
                json.EndObject();
                json.EndArray();
            }
            json.EndObject();
        }
        json.Member("page_size", Core.Memory.RamBlock.PageSize);
        json.StartArray("devices");
        json.Raw(_devices);
        json.EndArray();
        json.EndObject();
        return json;
    }

    private static void Field(VmDescJson json, string name, string type, int size, int arrayLength = 0)
    {
        json.StartObject();
        json.Member("name", name);
        if (arrayLength > 0) json.Member("array_len", arrayLength);
        json.Member("type", type);
        json.Member("size", size);
        json.EndObject();
    }
}
