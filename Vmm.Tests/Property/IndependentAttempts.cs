using System.Security.Cryptography;
using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Migration;
using Vmm.Migration.Channels;
using Vmm.Migration.Engine;
using Vmm.Migration.Snapshot;
using Vmm.Migration.Status;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;

namespace Vmm.Tests.Property;

/// <summary>
/// Attempts are independent. A VM migrates, cancels, fails, saves, loads and receives in random order; each attempt must have the same result
/// as on a fresh VM with the same RAM and device: the same end, bytes, RAM and error.
/// </summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class IndependentAttempts
{
    private const int SequencesInAPart = 20, AttemptsInASequence = 5;
    private const ulong RamBytes = 16 * 4096, FileBytes = 8 * 4096;
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(120);
    private static readonly Guid s_uuid = new("12345678-1234-5678-9abc-def012345678");

    private static readonly MigrationCapability[] s_capabilities =
    [
        MigrationCapability.Events, MigrationCapability.ReturnPath, MigrationCapability.PauseBeforeSwitchover, MigrationCapability.ValidateUuid,
        MigrationCapability.SwitchoverAck, MigrationCapability.Multifd, MigrationCapability.XIgnoreShared,
    ];

    private TempDirectory _folder = null!;
    private byte[][] _streams = [];

    private enum Kind
    {
        Migrate,
        MigrateOverSockets,
        Cancel,
        Fail,
        SaveVm,
        CancelledSaveVm,
        LoadVm,
        LoadDamagedVm,
        Incoming,
        CutIncoming,
    }

    /// <summary>One attempt, which runs in the same way on both VMs.</summary>
    private sealed record Attempt(Kind Kind, MigrationCapability[] On, ZeroPageDetection ZeroPages, int Stream, int Cut)
    {
        public override string ToString() => $"{Kind} [{string.Join(' ', On)}] zero-page-detection={ZeroPages} stream {Stream} cut {Cut}";
    }

    /// <summary>The results of an attempt that must not depend on earlier attempts.</summary>
    private sealed record Outcome(string End, RunState State, string Bytes, string Ram, string Device);

    [OneTimeSetUp]
    public async Task MakeStreams()
    {
        _folder = new TempDirectory();
        var streams = new List<byte[]>();
        foreach (MigrationCapability[] on in (MigrationCapability[][])[[], [MigrationCapability.XIgnoreShared], [MigrationCapability.ValidateUuid]])
        {
            using var source = new Machine(_folder, 100 + streams.Count);
            source.Use(on, ZeroPageDetection.Legacy);
            var channel = new MemoryChannel();
            Assert.That(await source.Vm.Engine.Migrate(channel).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
            streams.Add(channel.Written);
        }
        _streams = [.. streams];
    }

    [OneTimeTearDown]
    public void RemoveFolder() => _folder.Dispose();

    /// <summary>Runs 25 parts of 20 sequences of 5 attempts.</summary>
    [Test]
    public async Task AnAttemptDoesNotDependOnThoseBeforeIt([Range(1, 25)] int part)
    {
        for (int sequence = 0; sequence < SequencesInAPart; sequence++)
        {
            var random = new Random((part * 1000) + sequence);
            using var used = new Machine(_folder, random.Next());
            used.SaveForLoading();
            var before = new List<Attempt>();
            for (int i = 0; i < AttemptsInASequence; i++)
            {
                Attempt attempt = Draw(random);
                using Machine fresh = used.Copy(_folder);
                Outcome expected = await fresh.Run(attempt, _streams), found = await used.Run(attempt, _streams);
                before.Add(attempt);
                Assert.That(found, Is.EqualTo(expected), () => $"seed {part}/{sequence}, attempt {i}: {string.Join("; ", before)}");
            }
        }
    }

    /// <summary>The bug that led to this rule: after a load with x-ignore-shared, each later load expected addresses in the block list.</summary>
    [Test]
    public async Task AfterAnIncomingMigrationWithIgnoreSharedASnapshotLoads()
    {
        using var machine = new Machine(_folder, 7);
        machine.SaveForLoading();
        MigrationCapability[] on = [MigrationCapability.XIgnoreShared];
        Outcome incoming = await machine.Run(new Attempt(Kind.Incoming, on, ZeroPageDetection.Legacy, 1, 0), _streams);
        Assert.That(incoming.End, Is.EqualTo("Completed"));
        foreach (MigrationCapability[] then in (MigrationCapability[][])[on, []])
            Assert.That((await machine.Run(new Attempt(Kind.LoadVm, then, ZeroPageDetection.Legacy, 0, 0), _streams)).End, Is.EqualTo("loaded"));
    }

    private static Attempt Draw(Random random)
    {
        var on = s_capabilities.Where(_ => random.Next(3) == 0).ToHashSet();
        if (on.Contains(MigrationCapability.SwitchoverAck)) on.Add(MigrationCapability.ReturnPath);
        Kind kind = random.GetItems(Enum.GetValues<Kind>(), 1)[0];
        // Multifd needs sockets, and the engine refuses it on other channels. Test such refusals too, but less often.
        if (kind == Kind.MigrateOverSockets) on.Add(MigrationCapability.Multifd);
        else if (random.Next(4) != 0) on.Remove(MigrationCapability.Multifd);
        return new Attempt(kind, [.. on.Order()], random.GetItems(Enum.GetValues<ZeroPageDetection>(), 1)[0], random.Next(3), random.Next(1, 20_000));
    }

    /// <summary>A VM that never runs, with RAM in a memfd and in a shared file and with a VFIO device.</summary>
    private sealed class Machine : IDisposable
    {
        private readonly TempDirectory _folder;
        private readonly string _name = Guid.NewGuid().ToString("N")[..12];

        internal Machine(TempDirectory folder, int? seed)
        {
            _folder = folder;
            Vm = new TestVm(
                new VmOptions
                {
                    Uuid = s_uuid, AutoStart = false,
                    Memory = [new RamBlockOptions { Name = "m", SizeBytes = RamBytes }, new RamBlockOptions { Name = "f", SizeBytes = FileBytes, FilePath = folder[_name] }],
                },
                b => b.AddPlugin<VfioPlugin>().Services.AddSingleton(new SnapshotOptions { Directory = Store }));
            Io = new FakeVfioDevice("d", VfioMigrationFlags.StopCopy);
            VfioPair.Add(Vm, 0, Io);
            // A long time limit keeps all RAM in one section, so that the same RAM always gives the same stream.
            Vm.FullEngine.Context.IterateLimit = TimeSpan.FromMinutes(1);
            if (seed is not { } value) return;
            Vm.FilledRandom(value, halfZero: true);
            Io.State = StateOf(value);
        }

        internal TestVm Vm { get; }

        private FakeVfioDevice Io { get; }

        private string Store => _folder[_name + ".store"];

        /// <summary>Creates a fresh VM with the same content.</summary>
        internal Machine Copy(TempDirectory folder)
        {
            var copy = new Machine(folder, null);
            foreach (RamBlock block in Vm.Vm.Memory.Blocks)
                block.ReadOnlySlice(0, (int)block.SizeBytes).CopyTo(copy.Vm.Vm.Memory.FindBlock(block.Name)!.Slice(0, (int)block.SizeBytes));
            copy.Io.State = [.. Io.State];
            foreach (string name in (string[])["good", "bad"])
            {
                Directory.CreateDirectory(Path.Combine(copy.Store, name));
                foreach (string file in Directory.GetFiles(Path.Combine(Store, name))) File.Copy(file, Path.Combine(copy.Store, name, Path.GetFileName(file)));
            }
            return copy;
        }

        /// <summary>Saves a good snapshot and a damaged one for the loads.</summary>
        internal void SaveForLoading()
        {
            foreach (string name in (string[])["good", "bad"]) Vm.Vm.Snapshots().Save(name, overwrite: false, null, CancellationToken.None);
            using FileStream file = File.Open(Path.Combine(Store, "bad", "vmstate"), FileMode.Open);
            file.Position = file.Length / 2;
            int old = file.ReadByte();
            file.Position--;
            file.WriteByte((byte)~old);
        }

        internal void Use(IEnumerable<MigrationCapability> on, ZeroPageDetection zeroPages)
        {
            Vm.Engine.SetCapabilities(s_capabilities.Select(c => KeyValuePair.Create(c, on.Contains(c))));
            Vm.Engine.Parameters = Vm.Engine.Parameters with { ZeroPageDetection = zeroPages };
        }

        internal async Task<Outcome> Run(Attempt attempt, byte[][] streams)
        {
            Use(attempt.On, attempt.ZeroPages);
            byte[] written = [];
            string end;
            try
            {
                (end, written) = await Begin(attempt, streams).WaitAsync(s_deadline);
            }
            catch (Exception e) when (e is VmmException or OperationCanceledException)
            {
                end = $"{e.GetType().Name}: {e.Message}";
            }
            RunState state = Vm.Vm.RunState.State;
            if (state != RunState.PreLaunch) using (Vm.Vm.Bql.Acquire()) Vm.Vm.RunState.Set(RunState.PreLaunch);
            // Each machine has its own file and socket names, so compare messages without them.
            return new Outcome(end.Replace(_name, "NAME", StringComparison.Ordinal), state, Hash(written), Hash(Ram()), Hash(Io.State));
        }

        public void Dispose() => Vm.Dispose();

        private async Task<(string End, byte[] Written)> Begin(Attempt attempt, byte[][] streams)
        {
            switch (attempt.Kind)
            {
                case Kind.Migrate: return await Migrate(attempt, static c => c);
                case Kind.Fail: return await Migrate(attempt, c => new FaultyChannel(c, attempt.Cut));
                case Kind.Cancel: return await Migrate(attempt, c => new CallingChannel(c, attempt.Cut, Vm.Engine.Cancel));
                case Kind.MigrateOverSockets: return await MigrateOverSockets(attempt);
                case Kind.SaveVm:
                    Vm.Vm.Snapshots().Save("s", overwrite: true, null, CancellationToken.None);
                    return ("saved", File.ReadAllBytes(Path.Combine(Store, "s", "vmstate")));
                case Kind.CancelledSaveVm:
                    using (var cancel = new CancellationTokenSource())
                        Vm.Vm.Snapshots().Save("c", overwrite: true, (done, _) => { if (done >= attempt.Cut) cancel.Cancel(); }, cancel.Token);
                    return ("saved before it was cancelled", []);
                case Kind.LoadVm or Kind.LoadDamagedVm:
                    Vm.Vm.Snapshots().Load(attempt.Kind == Kind.LoadVm ? "good" : "bad", null, CancellationToken.None);
                    return ("loaded", []);
                default:
                    byte[] stream = streams[attempt.Stream];
                    using (Vm.Vm.Bql.Acquire()) Vm.Vm.RunState.Set(RunState.InMigrate);
                    MigrationStatus end = await Vm.Engine.MigrateIncoming(new MemoryChannel(attempt.Kind == Kind.Incoming ? stream : stream[..Math.Min(attempt.Cut, stream.Length - 1)]));
                    return ($"{end}{Error()}", []);
            }
        }

        private async Task<(string End, byte[] Written)> Migrate(Attempt attempt, Func<IMigrationChannel, IMigrationChannel> wrap)
        {
            bool answered = attempt.On.Contains(MigrationCapability.ReturnPath);
            using var destination = answered ? Receiver(attempt) : null;
            IMigrationChannel inner;
            Task<MigrationStatus>? incoming = null;
            if (destination is null)
            {
                inner = new MemoryChannel();
            }
            else
            {
                (InMemoryChannel ours, InMemoryChannel theirs) = InMemoryChannel.CreatePair();
                inner = ours;
                incoming = destination.Vm.Engine.MigrateIncoming(theirs);
            }
            var recording = new RecordingChannel(inner);
            MigrationStatus end = await Follow(() => Vm.Engine.Migrate(wrap(recording)));
            if (incoming is not null) await incoming;
            // Timing decides how far a cancelled migration comes, and which side first reports a lost link, so leave out those errors.
            bool isCertain = attempt.Kind == Kind.Migrate || (attempt.Kind == Kind.Fail && !answered);
            return ($"{end}{(isCertain ? Error() : "")}", end == MigrationStatus.Completed ? WithoutEmptyParts(recording.Written) : []);
        }

        /// <summary>
        /// Removes PART sections of RAM without pages (<c>u8 2, be32 id, be64 EOS, u8 0x7e, be32 id</c>). The source writes them while the device's state
        /// waits for the first measurement of the bandwidth, so timing decides their count.
        /// </summary>
        private static byte[] WithoutEmptyParts(byte[] stream)
        {
            byte[] name = [3, .. "ram"u8];
            int start = stream.AsSpan().IndexOf(name);
            byte[] id = stream[(start - 4)..start], part = [2, .. id, 0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, .. id];
            var kept = new MemoryStream();
            for (ReadOnlySpan<byte> left = stream; ;)
            {
                int at = left.IndexOf(part);
                kept.Write(at < 0 ? left : left[..at]);
                if (at < 0) return kept.ToArray();
                left = left[(at + part.Length)..];
            }
        }

        private async Task<(string End, byte[] Written)> MigrateOverSockets(Attempt attempt)
        {
            using Machine destination = Receiver(attempt);
            Task<MigrationStatus> incoming = destination.Vm.Engine.MigrateIncoming(MigrationAddress.Parse($"unix:{_folder[destination._name + ".s"]}"));
            MigrationStatus end = await Follow(() => Vm.Engine.Migrate(MigrationAddress.Parse($"unix:{_folder[destination._name + ".s"]}")));
            MigrationStatus there = await incoming;
            return ($"{end}, {there}{Error()}", there == MigrationStatus.Completed ? [.. destination.Ram(), .. destination.Io.State] : []);
        }

        /// <summary>Runs a migration and continues it when it pauses before the switchover.</summary>
        private async Task<MigrationStatus> Follow(Func<Task<MigrationStatus>> migrate)
        {
            void OnStatus(MigrationStatus status)
            {
                if (status == MigrationStatus.PreSwitchover) Task.Run(() => Vm.Engine.Continue(MigrationStatus.PreSwitchover));
            }
            Vm.Engine.StatusChanged += OnStatus;
            try
            {
                return await migrate();
            }
            finally
            {
                Vm.Engine.StatusChanged -= OnStatus;
            }
        }

        private Machine Receiver(Attempt attempt)
        {
            var destination = new Machine(_folder, null);
            destination.Use(attempt.On, attempt.ZeroPages);
            // With x-ignore-shared both machines would share one file; here each has its own, so copy the content.
            RamBlock from = Vm.Vm.Memory.FindBlock("f")!;
            from.ReadOnlySlice(0, (int)from.SizeBytes).CopyTo(destination.Vm.Vm.Memory.FindBlock("f")!.Slice(0, (int)from.SizeBytes));
            using (destination.Vm.Vm.Bql.Acquire()) destination.Vm.Vm.RunState.Set(RunState.InMigrate);
            return destination;
        }

        private string Error() => Vm.Engine.Query().Error is { } error ? $" ({error})" : string.Empty;

        private byte[] Ram() => [.. Vm.Vm.Memory.Blocks.SelectMany(static b => b.ReadOnlySlice(0, (int)b.SizeBytes).ToArray())];

        private static byte[] StateOf(int seed)
        {
            byte[] state = new byte[3000];
            new Random(seed).NextBytes(state);
            return state;
        }

        private static string Hash(byte[] bytes) => bytes.Length == 0 ? "" : $"{bytes.Length}:{Convert.ToHexString(SHA256.HashData(bytes))[..16]}";
    }

    /// <summary>Calls an action once when this many bytes have been written.</summary>
    private sealed class CallingChannel(IMigrationChannel inner, long afterBytes, Action call) : IMigrationChannel
    {
        private long _written;

        public string Name => inner.Name;

        public bool IsBidirectional => inner.IsBidirectional;

        public bool PeerHasClosed => inner.PeerHasClosed;

        public int Read(Span<byte> destination) => inner.Read(destination);

        public void Write(ReadOnlySpan<byte> source)
        {
            Count(source.Length);
            inner.Write(source);
        }

        public void WriteGather(Core.Buffers.GatherList parts)
        {
            Count(parts.PendingBytes);
            inner.WriteGather(parts);
        }

        public void Shutdown(ChannelShutdown how) => inner.Shutdown(how);

        public bool Drain(TimeSpan timeout) => inner.Drain(timeout);

        public void Dispose() => inner.Dispose();

        private void Count(long bytes)
        {
            bool before = _written < afterBytes;
            _written += bytes;
            if (before && _written >= afterBytes) call();
        }
    }
}
