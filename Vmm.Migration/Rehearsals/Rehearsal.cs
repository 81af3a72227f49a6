using Vmm.Core.Channels;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.VmStates;
using Vmm.Core.Wire;
using Vmm.Migration.Attempts;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Rehearsals;

/// <summary>
/// Runs the code of the switchover once, on stand-in sections, before the VM is stopped. Code that runs for the first time is compiled first, which would
/// otherwise add to the downtime. Touches no device and no VM.
/// </summary>
internal static class Rehearsal
{
    /// <summary>Saves and loads a stand-in machine; the first run in a process compiles the code and takes longest.</summary>
    internal static void Run()
    {
        var bql = new Bql();
        var registry = new SaveVmRegistry(bql);
        var device = new StandIn();
        using var global = new GlobalStateSection();
        registry.Register(new SaveVmRegistration { IdStr = "iterable", InstanceId = 0 }, SaveVmHandlers.Of(device));
        registry.Register(new SaveVmRegistration { IdStr = StandIn.Description.Name, InstanceId = 0 }, StandIn.Description.Bind(device));
        global.Register(registry);
        var machine = new MachineIdentity("none", Guid.Empty);
        using var channel = new MemoryStreamChannel();
        Save(registry, channel, machine);
        channel.Rewind();
        Load(registry, channel, machine);
        new ReturnPathWriter(channel).SendShut(null);
        var runState = new RunStateNotifier(bql);
        using (bql.Acquire())
        {
            runState.Start();
            runState.Stop(RunState.FinishMigrate);
        }
    }

    private static void Save(SaveVmRegistry registry, MemoryStreamChannel channel, MachineIdentity machine)
    {
        using var f = new QemuFileWriter(channel);
        var stream = new SaveStream(registry, f, new SaveContext());
        StreamHeader.Write(f, machine, stream.Context);
        using (registry.Bql.Acquire())
        {
            stream.SavePrepare();
            stream.SaveSetup();
            stream.SaveLiveCompletePrecopy();
            stream.SaveState();
        }
        StreamEnd.Write(f, stream, machine);
        f.Flush();
        stream.SaveCleanup();
    }

    private static void Load(SaveVmRegistry registry, MemoryStreamChannel channel, MachineIdentity machine)
    {
        var f = new QemuFileReader(channel);
        var commands = new CommandReader(f, null);
        var stream = new LoadStream(registry, f, new LoadContext()) { ReadCommand = commands.Read, OnSwitchover = static () => { } };
        StreamHeader.Read(f, machine, stream.Context);
        commands.ReadLeading();
        stream.LoadSetup();
        stream.ReadSections();
        StreamEnd.Skip(f, stream.Context);
        stream.LoadCleanup();
    }

    private sealed class StandIn : ISaveSetup, ISaveLive, ILoadState
    {
        internal static readonly VmStateDescription<StandIn> Description = new()
        {
            Name = "rehearsal",
            Fields =
            [
                VmState.Bool<StandIn>("flag", static s => ref s._flag),
                VmState.UInt8<StandIn>("u8", static s => ref s._u8),
                VmState.UInt32<StandIn>("u32", static s => ref s._u32),
                VmState.UInt64<StandIn>("u64", static s => ref s._u64),
                VmState.Int64<StandIn>("i64", static s => ref s._i64),
                VmState.Unused<StandIn>(8),
            ],
        };

        private bool _flag;
        private byte _u8;
        private uint _u32;
        private ulong _u64;
        private long _i64;

        public bool IsActiveIterate => true;

        public void SaveSetup(QemuFileWriter f) => f.WriteByte(0);

        public PendingBytes EstimatePending() => default;

        public PendingBytes ExactPending() => default;

        public SaveProgress SaveLiveIterate(QemuFileWriter f, IterateBudget budget)
        {
            f.WriteByte(0);
            return SaveProgress.Done;
        }

        public void SaveLiveCompletePrecopy(QemuFileWriter f) => f.WriteByte(0);

        public void LoadState(QemuFileReader f, int versionId) => f.ReadByte();
    }
}
