using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.VmStates;
using Vmm.Core.Wire;
using Vmm.Migration.Incoming;
using Vmm.Migration.Snapshot;
using Vmm.Migration.State;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Outgoing;

/// <summary>
/// Runs the code of the switchover once, on stand-in sections, before the VM is stopped: code that runs for the first time is compiled first,
/// and that would be downtime. Touches no device and no VM.
/// </summary>
internal static class Rehearsal
{
    /// <summary>Saves and loads a stand-in machine; a few ms the first time in a process, microseconds later.</summary>
    internal static void Run()
    {
        var bql = new Bql();
        var registry = new SaveVmRegistry(bql);
        var device = new StandIn();
        var global = new GlobalState();
        registry.Register(new SaveVmRegistration { IdStr = "iterable", InstanceId = 0 }, SaveVmHandlers.Of(device));
        registry.Register(new SaveVmRegistration { IdStr = StandIn.Description.Name, InstanceId = 0 }, StandIn.Description.Bind(device));
        registry.Register(new SaveVmRegistration { IdStr = global.Name, InstanceId = 0 }, global);
        var machine = new MachineView("none", Guid.Empty, registry, bql);
        using var stream = new MemoryStream();
        using var channel = new StreamChannel(stream);
        using (var f = new QemuFileWriter(channel))
        {
            var dispatcher = new SaveDispatcher(machine, f, new MigrationCompat(), sendUuid: false);
            dispatcher.WriteHeader();
            using (bql.Acquire())
            {
                dispatcher.Prepare();
                dispatcher.Setup(CancellationToken.None);
                dispatcher.CompleteIterables();
                dispatcher.WriteDeviceState();
            }
            dispatcher.WriteEnd();
            f.Flush();
            dispatcher.Cleanup();
        }
        stream.Position = 0;
        var reader = new SectionReader(machine, new QemuFileReader(channel), new MigrationCompat(), validateUuid: false) { OnSwitchover = static () => { } };
        reader.ReadHeader();
        reader.LoadSetup();
        reader.ReadSections();
        reader.SkipVmDescription();
        reader.LoadCleanup();
        new ReturnPathWriter(channel).SendShut(null);
        var runState = new RunStateNotifier(bql);
        using (bql.Acquire())
        {
            runState.Start();
            runState.Stop(RunState.FinishMigrate);
        }
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

        public void SavePrepare()
        {
        }

        public void SaveSetup(QemuFileWriter f, CancellationToken cancel) => f.WriteByte(0);

        public void SaveCleanup()
        {
        }

        public PendingBytes EstimatePending() => default;

        public PendingBytes ExactPending() => default;

        public SaveProgress SaveLiveIterate(QemuFileWriter f, IterateBudget budget)
        {
            f.WriteByte(0);
            return SaveProgress.Done;
        }

        public void SaveLiveCompletePrecopy(QemuFileWriter f) => f.WriteByte(0);

        public void LoadSetup(QemuFileReader f)
        {
        }

        public void LoadState(QemuFileReader f, int versionId) => f.ReadByte();

        public void LoadCleanup()
        {
        }
    }
}
