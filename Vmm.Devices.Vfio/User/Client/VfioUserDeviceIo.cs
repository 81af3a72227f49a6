using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>
/// A device behind a vfio-user server (vfio-user 10.5). Once the server is gone every call answers ENODEV at once; <see cref="Lost"/> and
/// <see cref="LostReason"/> give the reason. <see cref="Reattach"/> replaces the server.
/// </summary>
internal sealed partial class VfioUserDeviceIo : IVfioDeviceIo
{
    private const int AgainMs = 50;
    private const string NoFeatures = "its server ends the connection when it is asked how the device migrates (DEVICE_FEATURE)";

    private readonly VfioUserOptions _options;
    private readonly VfioUserContainer _container;
    private readonly GuestMemory _memory;
    private readonly Lock _lostGate = new();
    private volatile VfioUserLink _link;
    private Action<VmmException>? _lostHandlers;
    private VmmException? _lost;

    private VfioUserDeviceIo(VfioUserOptions options, VfioUserContainer container, GuestMemory memory, VfioUserLink link)
    {
        (_options, _container, _memory, _link) = (options, container, memory, link);
        link.Client.Lost += OnLost;
        // The loss may have come before the handler.
        if (link.Client.Fault is { } fault) OnLost(fault);
    }

    private VfioUserFeatures Features => _link.Features;

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
    public VfioDeviceInfo Info => _link.Info;

    /// <inheritdoc/>
    public IVfioContainer Container => _container;

    /// <inheritdoc/>
    public VmmException? LostReason => Client.Fault;

    /// <inheritdoc/>
    public string? NoMigrationReason { get; private init; }

    /// <summary>The connection.</summary>
    internal VfioUserClient Client => _link.Client;

    /// <summary>Connects to the server that the options name and attaches. BQL: held.</summary>
    /// <param name="options">The device's options (<see cref="VfioUserOptions"/>).</param>
    /// <param name="services">The VM.</param>
    /// <returns>The open device; owned by the caller.</returns>
    /// <exception cref="VmmException">Bad options, no server, or one that we do not trust; nothing is left behind.</exception>
    internal static VfioUserDeviceIo Connect(DeviceOptions options, IDeviceServices services)
    {
        ArgumentNullException.ThrowIfNull(services);
        VfioUserOptions parsed = VfioUserOptions.From(options);
        var container = new VfioUserContainer(parsed.SocketPath);
        if (!services.CprFds.IsIncoming) return OpenNew(parsed, container, services.Memory);
        var client = new VfioUserClient(VfioUserHandover.Take(services.CprFds, options.Id), parsed.SocketPath, container, parsed.TimeoutMs);
        return Make(parsed, container, services.Memory, VfioUserLink.Open(parsed, container, services.Memory, client));
    }

    /// <summary>As <see cref="Connect"/>, over a socket that is connected already.</summary>
    /// <param name="options">Options.</param>
    /// <param name="memory">Guest RAM.</param>
    /// <param name="socket">A connected UNIX stream socket; owned.</param>
    /// <returns>The open device.</returns>
    internal static VfioUserDeviceIo Open(VfioUserOptions options, GuestMemory memory, OwnedFd socket)
    {
        var container = new VfioUserContainer(options.SocketPath);
        return Make(options, container, memory, VfioUserLink.Open(options, container, memory, new VfioUserClient(socket, options.SocketPath, container, options.TimeoutMs)));
    }

    /// <summary>Connects to a server; a second time, without DEVICE_FEATURE, to one that ends the connection at this command.</summary>
    private static VfioUserDeviceIo OpenNew(VfioUserOptions options, VfioUserContainer container, GuestMemory memory)
    {
        VfioUserLink link = OpenLink(options, container, memory);
        if (link.Client.Fault is null) return Make(options, container, memory, link);
        VmmException why = link.Client.Fault;
        link.Dispose();
        VfioUserOptions silent = options with { NoFeatures = true };
        link = ConnectAgain(silent, container, memory, why);
        link.Client.Recorder?.Record(VfioUserCommand.DeviceFeature, VfioUserFeature.GetMigration, Errno.ENODEV, [], []);
        return Make(silent, container, memory, link, isEnding: true);
    }

    /// <summary>Connects, and records the answers: the next process sends the same requests when it opens the device.</summary>
    private static VfioUserLink OpenLink(VfioUserOptions options, VfioUserContainer container, GuestMemory memory)
    {
        VfioUserClient client = VfioUserClient.Connect(options.SocketPath, container, options.TimeoutMs);
        client.IsRecording = true;
        return VfioUserLink.Open(options, container, memory, client);
    }

    /// <summary>The server may need a moment until it takes the next client.</summary>
    private static VfioUserLink ConnectAgain(VfioUserOptions options, VfioUserContainer container, GuestMemory memory, VmmException why)
    {
        long until = Environment.TickCount64 + options.TimeoutMs;
        while (true)
        {
            try
            {
                return OpenLink(options, container, memory);
            }
            catch (VmmException e) when (Environment.TickCount64 < until && e.Errno is Errno.ECONNREFUSED or Errno.ENOENT or Errno.EBUSY)
            {
                Thread.Sleep(AgainMs);
            }
            catch (VmmException e)
            {
                throw new VfioException($"vfio-user '{options.SocketPath}': the server ended the connection at DEVICE_FEATURE ({VmmException.Describe(why)}), and now: {e.Message}", e.Errno, e)
                {
                    Hint = "enable-migration=off uses the device without this command",
                };
            }
        }
    }

    private static VfioUserDeviceIo Make(VfioUserOptions options, VfioUserContainer container, GuestMemory memory, VfioUserLink link, bool isEnding = false)
    {
        isEnding |= link.Features.IsKnownToEnd;
        return new(options with { NoFeatures = options.NoFeatures || isEnding }, container, memory, link) { NoMigrationReason = isEnding ? NoFeatures : null };
    }

    /// <inheritdoc/>
    public VfioRegionInfo GetRegionInfo(uint index) => index < _link.Regions.Count ? _link.Regions[(int)index].Info : new VfioRegionInfo { Index = index };

    /// <inheritdoc/>
    public VfioIrqInfo GetIrqInfo(uint index) => index < _link.Irqs.Count ? _link.Irqs[(int)index] : default;

    /// <inheritdoc/>
    public Errno RegionRead(uint index, ulong offset, Span<byte> destination)
    {
        while (destination.Length > 0)
        {
            int n = Math.Min(destination.Length, Client.MaxDataBytes);
            using VfioUserExchange x = Client.Begin();
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
        posted = posted && _link.MayPost && index <= VfioPciRegion.Bar0 + 5;
        while (source.Length > 0)
        {
            // x-mig-chunk may be smaller than a register.
            int n = Math.Min(source.Length, Math.Min(Client.MaxDataBytes, Math.Max(_options.ChunkBytes, VfioUserLimits.SafeDataBytes)));
            using VfioUserExchange x = Client.Begin();
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
    public MappedRegion? MapArea(uint index, VfioRegionArea area) => index < _link.Regions.Count ? _link.Regions[(int)index].Map(area, Name) : null;

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
            while (at + n < eventFds.Length && eventFds[at + n] is not null == bound && (!bound || n < Client.MaxFds)) n++;
            if (bound && n > Client.MaxFds) return Errno.EOPNOTSUPP;
            Errno errno = SetIrqs(request with { Start = request.Start + (uint)at, Count = (uint)n }, default, bound ? eventFds.Slice(at, n) : default, n);
            if (errno != Errno.None) return errno;
            at += n;
        }
        return Errno.None;
    }

    /// <inheritdoc/>
    public bool TakesUnmaskEventFd => false;

    /// <inheritdoc/>
    public Errno DeviceFeature(VfioDeviceFeature feature, VfioFeatureOp op, Span<byte> data) => Features.Call(feature, op, data, Client.TimeoutMs);

    /// <inheritdoc/>
    public void SetBusMaster(bool enabled) => _container.SetBusMaster(enabled);

    /// <inheritdoc/>
    public void Dispose()
    {
        Client.Lost -= OnLost;
        LeaveCpr();
        EndSession();
        _link.Dispose();
    }

    private void OnLost(VmmException reason)
    {
        Action<VmmException>? handlers;
        lock (_lostGate)
        {
            // A late word about a server that has been replaced.
            if (!ReferenceEquals(Client.Fault, reason)) return;
            _lost = reason;
            handlers = _lostHandlers;
        }
        handlers?.Invoke(reason);
    }

    private Errno SetIrqs(in VfioIrqSet request, ReadOnlySpan<byte> bools, ReadOnlySpan<OwnedFd?> fds, int vectors)
    {
        if (vectors == 0 && request.Flags.HasFlag(VfioIrqSetFlags.DataBool) && bools.Length != request.Count) return Errno.EINVAL;
        using VfioUserExchange x = Client.Begin();
        Span<byte> body = x.Body(VfioUserIrqSet.Length + bools.Length);
        new VfioUserIrqSet((uint)body.Length, request.Flags, request.Index, request.Start, request.Count).Write(body);
        bools.CopyTo(body[VfioUserIrqSet.Length..]);
        return x.Run(VfioUserCommand.DeviceSetIrqs, fds: fds);
    }
}
