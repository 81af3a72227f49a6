using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Tests.Fakes;

/// <summary>A hosted device that records the calls of the server and fails those that a test chooses. Its saved state is <see cref="State"/>.</summary>
internal sealed class FakeVfioUserBackend : IVfioUserBackend
{
    internal const uint Bar0 = 0, Sparse = 1, Whole = 2, Config = 7;

    internal FakeVfioUserBackend() => Regions =
    [
        new VfioUserRegion { Index = Bar0, SizeBytes = 0x1000 },
        new VfioUserRegion { Index = Sparse, SizeBytes = 0x4000, Memory = Memory, Areas = [new(0x1000, 0x1000), new(0x3000, 0x1000)] },
        new VfioUserRegion { Index = Whole, SizeBytes = 0x4000, Memory = Memory },
        new VfioUserRegion { Index = Config, SizeBytes = 256 },
    ];

    internal VfioUserMemory Memory { get; } = new("fake", 0x4000);
    internal byte[] Registers { get; } = new byte[0x1000];
    internal List<string> Log { get; } = [];
    internal List<(VfioDeviceState From, VfioDeviceState To)> Transitions { get; } = [];
    internal Func<VfioDeviceState, VfioDeviceState, Errno> OnTransition { get; set; } = static (_, _) => Errno.None;
    internal Func<ValueTask<Errno>> OnQuiesce { get; set; } = static () => ValueTask.FromResult(Errno.None);
    /// <summary>Resets and transitions wait for this task.</summary>
    internal Task Hang { get; set; } = Task.CompletedTask;
    internal byte[] ConfigSpace { get; } = new byte[256];
    internal Errno CommitResult { get; set; }
    internal byte[] State { get; set; } = [.. Enumerable.Range(0, 10_000).Select(static i => (byte)(i * 7))];
    internal List<byte> Loaded { get; } = [];
    internal int Quiesced { get; private set; }
    internal int OpenSessions { get; private set; }
    internal VfioUserHost Host { get; private set; } = null!;
    internal Action<ulong>? OnWrite { get; set; }

    public string TypeName => "fake";
    public IReadOnlyList<VfioUserRegion> Regions { get; }
    public VfioMigrationFlags MigrationFlags { get; set; } = VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy;

    /// <summary>What the device says about its size; null when it does not know.</summary>
    internal ulong? StateEstimate { get; init; }

    public ulong? EstimateStateBytes() => StateEstimate;

    public uint GetIrqCount(uint index) => index switch { 0 => 1, 1 => 4, 2 => 20, _ => 0 };

    public void Realize(VfioUserHost host)
    {
        Host = host;
        host.Dma.IsBusMaster = true;
    }

    public void RegionRead(uint index, ulong offset, Span<byte> destination)
    {
        if (index == Bar0) Registers.AsSpan((int)offset, destination.Length).CopyTo(destination);
        else if (index is Sparse or Whole) Memory.Slice(offset, destination.Length).CopyTo(destination);
        else if (index == Config) ConfigSpace.AsSpan((int)offset, destination.Length).CopyTo(destination);
    }

    public void RegionWrite(uint index, ulong offset, ReadOnlySpan<byte> source)
    {
        if (index == Bar0) source.CopyTo(Registers.AsSpan((int)offset));
        else if (index is Sparse or Whole) source.CopyTo(Memory.Slice(offset, source.Length));
        OnWrite?.Invoke(offset);
    }

    public async ValueTask<Errno> Quiesce()
    {
        Errno errno = await OnQuiesce();
        if (errno == Errno.None) Quiesced++;
        lock (Log) Log.Add("quiesce");
        return errno;
    }

    public void Unquiesce()
    {
        Quiesced--;
        lock (Log) Log.Add("unquiesce");
    }

    public async ValueTask<Errno> Reset(VfioUserResetReason reason)
    {
        lock (Log) Log.Add($"reset {reason}");
        await Hang;
        return Errno.None;
    }

    public void ClientLost() => Log.Add("client lost");

    public async ValueTask<Errno> Transition(VfioDeviceState from, VfioDeviceState to)
    {
        Transitions.Add((from, to));
        await Hang;
        return OnTransition(from, to);
    }

    public IVfioUserSave OpenSave()
    {
        OpenSessions++;
        return new Save(this);
    }

    public IVfioUserLoad OpenLoad()
    {
        OpenSessions++;
        Loaded.Clear();
        return new Load(this);
    }

    public void Dispose() => Memory.Dispose();

    private sealed class Save(FakeVfioUserBackend device) : IVfioUserSave
    {
        private int _at;

        public void StopCopy()
        {
        }

        public int ReadState(Span<byte> destination, out Errno errno)
        {
            errno = Errno.None;
            // Reads are short on purpose, because the server must fill its replies all the same (vfio-user S-36).
            int n = Math.Min(Math.Min(destination.Length, 1000), device.State.Length - _at);
            device.State.AsSpan(_at, n).CopyTo(destination);
            _at += n;
            return n;
        }

        public bool TryTake(int count, out ReadOnlyMemory<byte> bytes)
        {
            bytes = default;
            return false;
        }

        public void Dispose() => device.OpenSessions--;
    }

    private sealed class Load(FakeVfioUserBackend device) : IVfioUserLoad
    {
        public Errno WriteState(ReadOnlySpan<byte> source)
        {
            if (device.Loaded.Count + source.Length > device.State.Length) return Errno.EFBIG;
            device.Loaded.AddRange(source);
            return Errno.None;
        }

        public ValueTask<Errno> Commit() => ValueTask.FromResult(device.CommitResult);

        public void Dispose() => device.OpenSessions--;
    }
}
