using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>
/// A device behind a vfio-user server (vfio-user 10.5). Everything that the server may refuse later, in STOP or STOP_COPY, is asked for
/// when the device is opened. Once the server is gone every call answers ENODEV at once; <see cref="Lost"/> and <see cref="LostReason"/> give the reason.
/// </summary>
internal sealed partial class VfioUserDeviceIo : IVfioDeviceIo
{
    private readonly VfioUserOptions _options;
    private readonly VfioUserContainer _container;
    private readonly VfioUserClient _client;
    private readonly VfioUserFeatures _features;
    private readonly List<VfioUserClientRegion> _regions = [];
    private readonly List<VfioIrqInfo> _irqs = [];
    private readonly Lock _lostGate = new();
    private Action<VmmException>? _lostHandlers;
    private VmmException? _lost;
    private bool _mayPost;

    private VfioUserDeviceIo(VfioUserOptions options, VfioUserContainer container, VfioUserClient client)
    {
        _options = options;
        _container = container;
        _client = client;
        _features = new VfioUserFeatures(client);
        client.Lost += OnLost;
    }

    /// <inheritdoc/>
    /// <remarks>A handler that is added after the loss is called too, once.</remarks>
    public event Action<VmmException>? Lost
    {
        add
        {
            lock (_lostGate)
            {
                if (_lost is null)
                {
                    _lostHandlers += value;
                    return;
                }
            }
            if (value is not null) ThreadPool.QueueUserWorkItem(static told => told.Handler(told.Reason), (Handler: value, Reason: _lost), preferLocal: false);
        }
        remove
        {
            lock (_lostGate) _lostHandlers -= value;
        }
    }

    /// <inheritdoc/>
    public string Name => _options.SocketPath;

    /// <inheritdoc/>
    public VfioDeviceInfo Info { get; private set; }

    /// <inheritdoc/>
    public IVfioContainer Container => _container;

    /// <inheritdoc/>
    public VmmException? LostReason => _client.Fault;

    /// <summary>The connection.</summary>
    internal VfioUserClient Client => _client;

    /// <summary>Connects to the server that the options name and attaches. BQL: held.</summary>
    /// <param name="options">The device's options (<see cref="VfioUserOptions"/>).</param>
    /// <param name="services">The VM.</param>
    /// <returns>The open device; owned by the caller.</returns>
    /// <exception cref="VmmException">Bad options, no server, or one that we do not trust; nothing is left behind.</exception>
    internal static VfioUserDeviceIo Connect(DeviceOptions options, IDeviceServices services)
    {
        ArgumentNullException.ThrowIfNull(services);
        VfioUserOptions parsed = VfioUserOptions.From(options);
        return Open(parsed, services.Memory, container => services.CprFds.IsIncoming
            ? new VfioUserClient(VfioUserHandover.Take(services.CprFds, options.Id), parsed.SocketPath, container, parsed.TimeoutMs)
            : Recording(VfioUserClient.Connect(parsed.SocketPath, container, parsed.TimeoutMs)));
    }

    /// <summary>Opens the device and records the answers: the next process sends the same requests when it opens the device.</summary>
    private static VfioUserClient Recording(VfioUserClient client)
    {
        client.IsRecording = true;
        return client;
    }

    /// <summary>As <see cref="Connect"/>, over a socket that is connected already.</summary>
    /// <param name="options">Options.</param>
    /// <param name="memory">Guest RAM.</param>
    /// <param name="socket">A connected UNIX stream socket; owned.</param>
    /// <returns>The open device.</returns>
    internal static VfioUserDeviceIo Open(VfioUserOptions options, GuestMemory memory, OwnedFd socket) =>
        Open(options, memory, container => new VfioUserClient(socket, options.SocketPath, container, options.TimeoutMs));

    private static VfioUserDeviceIo Open(VfioUserOptions options, GuestMemory memory, Func<VfioUserContainer, VfioUserClient> connect)
    {
        var container = new VfioUserContainer(options.SocketPath);
        var io = new VfioUserDeviceIo(options, container, connect(container));
        try
        {
            io.AttachMemory(memory);
            io.Query();
        }
        catch
        {
            io.Dispose();
            throw;
        }
        return io;
    }

    /// <inheritdoc/>
    public VfioRegionInfo GetRegionInfo(uint index) => index < _regions.Count ? _regions[(int)index].Info : new VfioRegionInfo { Index = index };

    /// <inheritdoc/>
    public VfioIrqInfo GetIrqInfo(uint index) => index < _irqs.Count ? _irqs[(int)index] : default;

    /// <inheritdoc/>
    public Errno RegionRead(uint index, ulong offset, Span<byte> destination)
    {
        while (destination.Length > 0)
        {
            int n = Math.Min(destination.Length, _client.MaxDataBytes);
            using VfioUserExchange x = _client.Begin();
            new VfioUserRegionAccess(offset, index, (uint)n).Write(x.Body(VfioUserRegionAccess.Length));
            Errno errno = x.Run(VfioUserCommand.RegionRead, VfioUserRegionAccess.Length + n);
            if (errno != Errno.None) return errno;
            if (!VfioUserRegionAccess.TryRead(x.Reply, out VfioUserRegionAccess done) || done.Count != n || x.Reply.Length != VfioUserRegionAccess.Length + n) return Errno.EINVAL;
            x.Reply[VfioUserRegionAccess.Length..].CopyTo(destination);
            destination = destination[n..];
            offset += (ulong)n;
        }
        return Errno.None;
    }

    /// <inheritdoc/>
    public Errno RegionWrite(uint index, ulong offset, ReadOnlySpan<byte> source, bool posted = false)
    {
        // Posting is for BARs, and only while no direct access could overtake it (vfio-user 10.5).
        posted = posted && _mayPost && index <= VfioPciRegion.Bar0 + 5;
        while (source.Length > 0)
        {
            int n = Math.Min(source.Length, Math.Min(_client.MaxDataBytes, _options.ChunkBytes));
            using VfioUserExchange x = _client.Begin();
            new VfioUserRegionAccess(offset, index, (uint)n).Write(x.Body(VfioUserRegionAccess.Length));
            Errno errno = posted ? x.Send(VfioUserCommand.RegionWrite, noReply: true, data: source[..n]) : x.Run(VfioUserCommand.RegionWrite, data: source[..n]);
            if (errno != Errno.None) return errno;
            if (!posted && (!VfioUserRegionAccess.TryRead(x.Reply, out VfioUserRegionAccess done) || done.Count != n)) return Errno.EINVAL;
            source = source[n..];
            offset += (ulong)n;
        }
        return Errno.None;
    }

    /// <inheritdoc/>
    public MappedRegion? MapArea(uint index, VfioRegionArea area) => index < _regions.Count ? _regions[(int)index].Map(area, Name) : null;

    /// <inheritdoc/>
    public Errno SetIrqs(in VfioIrqSet request, ReadOnlySpan<byte> bools, ReadOnlySpan<OwnedFd?> eventFds)
    {
        if (!request.Flags.HasFlag(VfioIrqSetFlags.DataEventFd)) return SetIrqs(request, bools, eventFds, 0);
        if (eventFds.Length != request.Count) return Errno.EINVAL;
        // A message binds all its vectors or none, and its descriptors are limited: each run of vectors gets its own message.
        for (int at = 0; at < eventFds.Length;)
        {
            bool bound = eventFds[at] is not null;
            int n = 1;
            while (at + n < eventFds.Length && eventFds[at + n] is not null == bound && (!bound || n < _client.MaxFds)) n++;
            if (bound && n > _client.MaxFds) return Errno.EOPNOTSUPP;
            Errno errno = SetIrqs(request with { Start = request.Start + (uint)at, Count = (uint)n }, default, bound ? eventFds.Slice(at, n) : default, n);
            if (errno != Errno.None) return errno;
            at += n;
        }
        return Errno.None;
    }

    /// <inheritdoc/>
    public bool TakesUnmaskEventFd => false;

    /// <inheritdoc/>
    public Errno DeviceFeature(VfioDeviceFeature feature, VfioFeatureOp op, Span<byte> data) => _features.Call(feature, op, data, _client.TimeoutMs);

    /// <inheritdoc/>
    public void SetBusMaster(bool enabled) => _container.SetBusMaster(enabled);

    /// <inheritdoc/>
    public void Dispose()
    {
        _client.Lost -= OnLost;
        LeaveCpr();
        EndSession();
        _container.Detach();
        _client.Dispose();
        foreach (VfioUserClientRegion region in _regions) region.Fd?.Dispose();
        _regions.Clear();
    }

    private void OnLost(VmmException reason)
    {
        Action<VmmException>? handlers;
        lock (_lostGate)
        {
            _lost = reason;
            handlers = _lostHandlers;
        }
        handlers?.Invoke(reason);
    }

    private Errno SetIrqs(in VfioIrqSet request, ReadOnlySpan<byte> bools, ReadOnlySpan<OwnedFd?> fds, int vectors)
    {
        if (vectors == 0 && request.Flags.HasFlag(VfioIrqSetFlags.DataBool) && bools.Length != request.Count) return Errno.EINVAL;
        using VfioUserExchange x = _client.Begin();
        Span<byte> body = x.Body(VfioUserIrqSet.Length + bools.Length);
        new VfioUserIrqSet((uint)body.Length, request.Flags, request.Index, request.Start, request.Count).Write(body);
        bools.CopyTo(body[VfioUserIrqSet.Length..]);
        return x.Run(VfioUserCommand.DeviceSetIrqs, fds: fds);
    }

    private void AttachMemory(GuestMemory memory)
    {
        try
        {
            _container.Attach(_client, _features, memory);
        }
        catch (VfioException e) when (e.Errno == Errno.EINVAL && _client.Fault is null && SetMigrationState(VfioDeviceState.Running, out _) == Errno.None)
        {
            // libvfio-user keeps the migration state of a client that died, and refuses everything in STOP_COPY until it is told to run (vfio-user 7).
            _container.Attach(_client, _features, memory);
        }
    }

    private void Query()
    {
        VfioUserDeviceInfo info = QueryInfo();
        Info = new VfioDeviceInfo((info.Flags & VfioUserDeviceInfo.FlagReset) != 0, (info.Flags & VfioUserDeviceInfo.FlagPci) != 0, info.NumRegions, info.NumIrqs);
        for (uint i = 0; i < info.NumRegions; i++) _regions.Add(VfioUserRegionQuery.Query(_client, i, _options.NoMmap));
        for (uint i = 0; i < info.NumIrqs; i++) _irqs.Add(QueryIrq(i));
        _mayPost = !_options.NoPostedWrites && _regions.TrueForAll(static r => r.Info.Areas.Count == 0);
    }

    private VfioUserDeviceInfo QueryInfo()
    {
        using VfioUserExchange x = _client.Begin();
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
        using VfioUserExchange x = _client.Begin();
        new VfioUserIrqInfo(VfioUserIrqInfo.Length, 0, index, 0).Write(x.Body(VfioUserIrqInfo.Length));
        Errno errno = x.Run(VfioUserCommand.DeviceGetIrqInfo);
        if (errno == Errno.EINVAL) return default;
        if (errno != Errno.None) throw Refused($"interrupt {index} info", errno);
        if (!VfioUserIrqInfo.TryRead(x.Reply, out VfioUserIrqInfo info) || info.Index != index) throw Broken($"interrupt {index} info: a reply of {x.Reply.Length} bytes about interrupt {info.Index}");
        if (info.Count > VfioUserLimits.Vectors) throw Broken($"interrupt {index} info: {info.Count} vectors, at most {VfioUserLimits.Vectors} are taken");
        return new VfioIrqInfo((VfioIrqInfoFlags)(info.Flags & 15), info.Count);
    }

    private VfioException Refused(string what, Errno errno) => new($"vfio-user '{Name}': {what}: {Posix.Describe(errno)}", errno, _client.Fault);

    private VfioUserProtocolException Broken(string what) => new($"vfio-user '{Name}': {what}");
}
