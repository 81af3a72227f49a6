using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>
/// One connection and what its server said when the device was opened. Everything that the server may refuse later, in STOP or STOP_COPY, is asked for
/// here. A new server gets a new link. BQL: held for opening and disposing.
/// </summary>
internal sealed class VfioUserLink : IDisposable
{
    private readonly VfioUserContainer _container;
    private readonly List<VfioUserClientRegion> _regions = [];
    private readonly List<VfioIrqInfo> _irqs = [];

    private VfioUserLink(VfioUserClient client, VfioUserContainer container)
    {
        (Client, _container) = (client, container);
        Features = new VfioUserFeatures(client);
    }

    internal VfioUserClient Client { get; }

    internal VfioUserFeatures Features { get; }

    internal VfioDeviceInfo Info { get; private set; }

    internal IReadOnlyList<VfioUserClientRegion> Regions => _regions;

    internal IReadOnlyList<VfioIrqInfo> Irqs => _irqs;

    /// <summary>Writes to BARs may be posted: no direct access could overtake one.</summary>
    internal bool MayPost { get; private set; }

    /// <summary>Attaches to a server: gives it the guest's memory and asks for everything. Owns the client, also when this throws.</summary>
    /// <exception cref="VmmException">The server is gone, refused the memory, or breaks a bound.</exception>
    internal static VfioUserLink Open(VfioUserOptions options, VfioUserContainer container, GuestMemory memory, VfioUserClient client)
    {
        var link = new VfioUserLink(client, container);
        try
        {
            // A server of minor 0 has the protocol from before DEVICE_FEATURE; one that was seen (rust-vmm's) loses its place in the stream at it.
            if (options.NoFeatures || client.Server.Minor == 0) link.Features.IsSilent = true;
            link.AttachMemory(memory);
            link.Query(options);
            link.Features.AskMigration();
            return link;
        }
        catch
        {
            link.Dispose();
            throw;
        }
    }

    /// <summary>Says in what a new server's device differs from this one's, so that it cannot take its place; null when it does not.</summary>
    internal string? DifferenceTo(VfioUserLink other)
    {
        if (Info != other.Info) return $"{other.Info}, {Info} expected";
        for (int i = 0; i < _regions.Count; i++)
        {
            VfioRegionInfo a = _regions[i].Info, b = other._regions[i].Info;
            bool same = (a.Flags, a.SizeBytes, a.Type, a.Subtype, a.IsMsixMappable) == (b.Flags, b.SizeBytes, b.Type, b.Subtype, b.IsMsixMappable) && a.Areas.SequenceEqual(b.Areas);
            if (!same) return $"region {i} has 0x{b.SizeBytes:x} bytes ({b.Flags}, {b.Areas.Count} areas), 0x{a.SizeBytes:x} ({a.Flags}, {a.Areas.Count} areas) expected";
        }
        for (int i = 0; i < _irqs.Count; i++)
            if (_irqs[i] != other._irqs[i]) return $"interrupt {i} is {other._irqs[i]}, {_irqs[i]} expected";
        return Features.Migration == other.Features.Migration ? null : "it migrates in another way";
    }

    /// <summary>Takes the guest's memory from the container and closes the connection.</summary>
    public void Dispose()
    {
        _container.Detach();
        Close();
    }

    /// <summary>Closes the connection, when another link has the container.</summary>
    internal void Close()
    {
        Client.Dispose();
        foreach (VfioUserClientRegion region in _regions) region.Fd?.Dispose();
        _regions.Clear();
    }

    private void AttachMemory(GuestMemory memory)
    {
        try
        {
            _container.Attach(Client, Features, memory);
        }
        catch (VfioException e) when (e.Errno == Errno.EINVAL && Client.Fault is null && SetRunning() == Errno.None)
        {
            // libvfio-user keeps the migration state of a client that died, and refuses everything in STOP_COPY until it is told to run (vfio-user 7).
            _container.Attach(Client, Features, memory);
        }
    }

    private Errno SetRunning()
    {
        Span<byte> data = stackalloc byte[VfioUserStateData.Length];
        new VfioUserStateData(VfioDeviceState.Running, VfioUserStateData.NoFd).Write(data);
        return Features.Call(VfioDeviceFeature.MigDeviceState, VfioFeatureOp.Set, data, Client.TimeoutMs);
    }

    private void Query(VfioUserOptions options)
    {
        VfioUserDeviceInfo info = QueryInfo();
        Info = new VfioDeviceInfo((info.Flags & VfioUserDeviceInfo.FlagReset) != 0, (info.Flags & VfioUserDeviceInfo.FlagPci) != 0, info.NumRegions, info.NumIrqs);
        for (uint i = 0; i < info.NumRegions; i++) _regions.Add(VfioUserRegionQuery.Query(Client, i, options.NoMmap));
        for (uint i = 0; i < info.NumIrqs; i++) _irqs.Add(QueryIrq(i));
        MayPost = !options.NoPostedWrites && _regions.TrueForAll(static r => r.Info.Areas.Count == 0);
    }

    private VfioUserDeviceInfo QueryInfo()
    {
        using VfioUserExchange x = Client.Begin();
        new VfioUserDeviceInfo(VfioUserDeviceInfo.Length, 0, 0, 0).Write(x.Body(VfioUserDeviceInfo.Length));
        Errno errno = x.Run(VfioUserCommand.DeviceGetInfo);
        if (errno != Errno.None) throw Refused("device info", errno);
        if (!VfioUserDeviceInfo.TryRead(x.Reply, out VfioUserDeviceInfo info)) throw Broken($"device info: a reply of {x.Reply.Length} bytes");
        if (info.NumRegions > VfioUserLimits.Regions) throw Broken($"device info: {info.NumRegions} regions, at most {VfioUserLimits.Regions} are taken");
        if (info.NumIrqs > VfioUserLimits.Irqs) throw Broken($"device info: {info.NumIrqs} interrupts, at most {VfioUserLimits.Irqs} are taken");
        return info;
    }

    private VfioIrqInfo QueryIrq(uint index)
    {
        using VfioUserExchange x = Client.Begin();
        new VfioUserIrqInfo(VfioUserIrqInfo.Length, 0, index, 0).Write(x.Body(VfioUserIrqInfo.Length));
        Errno errno = x.Run(VfioUserCommand.DeviceGetIrqInfo);
        if (errno == Errno.EINVAL) return default;
        if (errno != Errno.None) throw Refused($"interrupt {index} info", errno);
        if (!VfioUserIrqInfo.TryRead(x.Reply, out VfioUserIrqInfo info) || info.Index != index) throw Broken($"interrupt {index} info: a reply of {x.Reply.Length} bytes about interrupt {info.Index}");
        if (info.Count > VfioUserLimits.Vectors) throw Broken($"interrupt {index} info: {info.Count} vectors, at most {VfioUserLimits.Vectors} are taken");
        return new VfioIrqInfo((VfioIrqInfoFlags)(info.Flags & 15), info.Count);
    }

    private VfioException Refused(string what, Errno errno) => new($"vfio-user '{Client.Name}': {what}: {Posix.Describe(errno)}", errno, Client.Fault);

    private VfioUserProtocolException Broken(string what) => new($"vfio-user '{Client.Name}': {what}");
}
