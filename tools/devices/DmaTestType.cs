using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Tools.Devices;

/// <summary>How a <see cref="DmaTestDevice"/> behaves.</summary>
public sealed record DmaTestOptions
{
    public ulong StateBytes { get; init; }
    public ulong Seed { get; init; }
    public bool Precopy { get; init; } = true;
    public bool P2P { get; init; }
    /// <summary>Refuses the first transition into this state; null refuses none.</summary>
    public VfioDeviceState? Fail { get; init; }
    /// <summary>True refuses the data at the end of the first load.</summary>
    public bool FailCommit { get; init; }
    /// <summary>Duration of every transition.</summary>
    public int SlowMs { get; init; }
}

/// <summary><c>dma-test,state-size=SIZE,seed=N,precopy=on|off,p2p=on|off,fail=STATE|commit,slow-ms=N</c>.</summary>
public sealed class DmaTestType : IVfioUserDeviceType
{
    private const ulong MaxStateBytes = 64UL << 30;

    public string TypeName => "dma-test";

    public string Summary => "Writes numbered blocks into guest memory, and has a state of any size, for tests of migration";

    public IVfioUserBackend Create(DeviceOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        ulong size = options.GetSizeBytes("state-size", 0);
        if (size > MaxStateBytes) throw new ConfigurationException($"device '{TypeName}': option 'state-size' expects at most 64G");
        string fail = options.GetString("fail", "");
        // Two devices must not start with the same state, because a test could then not tell that the state has arrived.
        ulong seed = options.GetUInt64("seed", BitConverter.ToUInt64(Guid.NewGuid().ToByteArray()));
        var parsed = new DmaTestOptions
        {
            StateBytes = size, Seed = seed, Precopy = options.GetBool("precopy", true), P2P = options.GetBool("p2p", false),
            SlowMs = (int)options.GetUInt64("slow-ms", 0, 60_000), FailCommit = fail == "commit",
            Fail = fail is "" or "commit" ? null : ParseState(fail),
        };
        options.ThrowIfUnused();
        return new DmaTestDevice(parsed);
    }

    private static VfioDeviceState ParseState(string name) => name switch
    {
        "stop" => VfioDeviceState.Stop,
        "running" => VfioDeviceState.Running,
        "stop-copy" => VfioDeviceState.StopCopy,
        "resuming" => VfioDeviceState.Resuming,
        "running-p2p" => VfioDeviceState.RunningP2P,
        "pre-copy" => VfioDeviceState.PreCopy,
        "pre-copy-p2p" => VfioDeviceState.PreCopyP2P,
        _ => throw new ConfigurationException($"device 'dma-test': option 'fail' expects a migration state such as stop-copy, or commit; found '{name}'"),
    };
}
