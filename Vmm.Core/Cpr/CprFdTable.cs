using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;

namespace Vmm.Core.Cpr;

/// <summary>One descriptor under the key by which the next process finds it (QEMU: <c>CprFd</c>).</summary>
/// <param name="Name">Name, 1 to 1023 bytes of ASCII.</param>
/// <param name="Id">Number that tells descriptors of one name apart.</param>
/// <param name="Fd">The descriptor.</param>
internal sealed record CprFd(string Name, int Id, OwnedFd Fd);

/// <summary>An IOMMUFD device's objects, which descriptors alone do not tell (<c>iommufd</c>).</summary>
/// <param name="Name">Device name, as the PCI address.</param>
/// <param name="DevId">Id of the bound device.</param>
/// <param name="IoasId">Id of the address space.</param>
/// <param name="HwptId">Id of the page table.</param>
internal sealed record CprIommufdDevice(string Name, int DevId, uint IoasId, uint HwptId);

/// <summary>What a process was handed by the one before it. Owns the descriptors until a VM takes it over.</summary>
public sealed class CprIncoming : IDisposable
{
    /// <param name="mode">How they came.</param>
    /// <param name="fds">The descriptors; owned by the new object.</param>
    /// <param name="devices">IOMMUFD devices that the other process had open.</param>
    internal CprIncoming(MigrationMode mode, IReadOnlyList<CprFd> fds, IReadOnlyList<CprIommufdDevice> devices) => (Mode, Fds, Devices) = (mode, fds, devices);

    /// <summary><see cref="MigrationMode.CprTransfer"/> or <see cref="MigrationMode.CprExec"/>.</summary>
    public MigrationMode Mode { get; }

    internal IReadOnlyList<CprFd> Fds { get; }

    internal IReadOnlyList<CprIommufdDevice> Devices { get; }

    /// <summary>For another VM, should the first that is made of it fail: that one's descriptors are closed then.</summary>
    /// <returns>The same with descriptors of its own; the caller's.</returns>
    /// <exception cref="ChannelException">The process has no room for more descriptors.</exception>
    public CprIncoming Duplicate()
    {
        var copies = new List<CprFd>();
        try
        {
            foreach (CprFd fd in Fds) copies.Add(fd with { Fd = Posix.Duplicate(fd.Fd) });
            return new CprIncoming(Mode, copies, Devices);
        }
        catch
        {
            foreach (CprFd copy in copies) copy.Fd.Dispose();
            throw;
        }
    }

    /// <summary>Closes the descriptors that nobody took.</summary>
    public void Dispose()
    {
        foreach (CprFd fd in Fds) fd.Fd.Dispose();
    }
}

/// <summary>
/// The descriptors of one VM that outlive its process (vfio-migration 7.2; QEMU: <c>cpr_state.fds</c>). A descriptor enters when it is opened,
/// and every open asks <see cref="Take"/> first, so that one code path serves a cold start and a restart. Thread-safe.
/// </summary>
public sealed class CprFdTable : IDisposable
{
    private readonly Lock _gate = new();
    private readonly Dictionary<(string Name, int Id), OwnedFd> _saved = [];
    private readonly Dictionary<(string Name, int Id), OwnedFd> _received = [];
    private readonly Dictionary<string, CprIommufdDevice> _devices = [];
    private readonly Dictionary<string, CprIommufdDevice> _receivedDevices = [];
    private long _changes;

    /// <summary>Grows with every descriptor that enters or leaves: who handed out <see cref="Entries"/> sees whether they still hold.</summary>
    internal long Changes => Volatile.Read(ref _changes);

    /// <summary>
    /// Set from the stop on while another process takes the VM, and for good once it has: memory and devices are not this one's to change. BQL: held
    /// for writes.
    /// </summary>
    public bool IsLeaving { get; set; }

    /// <summary>
    /// The mode in which this VM is being made from another process's descriptors; null for a cold start, and once the VM runs here
    /// (QEMU: <c>cpr_get_incoming_mode</c>).
    /// </summary>
    public MigrationMode? IncomingMode { get; private set; }

    /// <summary>Devices must find, not make: no reset, no configuration, no new mappings (QEMU: <c>cpr_is_incoming</c>).</summary>
    public bool IsIncoming => IncomingMode is not null;

    /// <summary>Takes over what the process was handed; before anything is opened.</summary>
    /// <param name="incoming">The descriptors; owned by this table from here on. Of two with one key the first counts.</param>
    internal void Receive(CprIncoming incoming)
    {
        ArgumentNullException.ThrowIfNull(incoming);
        lock (_gate)
        {
            IncomingMode = incoming.Mode;
            foreach (CprFd one in incoming.Fds)
                if (!_received.TryAdd((one.Name, one.Id), one.Fd)) one.Fd.Dispose();
            foreach (CprIommufdDevice device in incoming.Devices) _receivedDevices.TryAdd(device.Name, device);
        }
    }

    /// <summary>Looks for a received descriptor and gives it away (QEMU: <c>cpr_find_fd</c>).</summary>
    /// <param name="name">Name.</param>
    /// <param name="id">Number.</param>
    /// <returns>The descriptor, the caller's from here on; null when there is none.</returns>
    public OwnedFd? Take(string name, int id)
    {
        lock (_gate) return _received.Remove((name, id), out OwnedFd? fd) ? fd : null;
    }

    /// <summary>As <see cref="Take"/>, for a descriptor without which the device cannot go on.</summary>
    /// <param name="name">Name.</param>
    /// <param name="id">Number.</param>
    /// <returns>The descriptor, the caller's from here on.</returns>
    /// <exception cref="IncompatibleStateException">The other process did not hand it over.</exception>
    public OwnedFd Require(string name, int id) => Take(name, id)
        ?? throw new IncompatibleStateException($"the process before this one handed over no descriptor '{name}' {id}")
        {
            Hint = "both processes need the same devices with the same ids",
        };

    /// <summary>The received ids of an IOMMUFD device, or null.</summary>
    /// <param name="name">Device name.</param>
    /// <returns>The ids.</returns>
    internal CprIommufdDevice? FindDevice(string name)
    {
        lock (_gate) return _receivedDevices.GetValueOrDefault(name);
    }

    /// <summary>Enters a descriptor (QEMU: <c>cpr_save_fd</c>).</summary>
    /// <param name="name">Name.</param>
    /// <param name="id">Number.</param>
    /// <param name="fd">The descriptor; stays the caller's, who removes it before closing it.</param>
    /// <returns>Dispose to remove it (QEMU: <c>cpr_delete_fd</c>).</returns>
    public IDisposable Save(string name, int id, OwnedFd fd)
    {
        ArgumentException.ThrowIfNullOrEmpty(name);
        ArgumentNullException.ThrowIfNull(fd);
        lock (_gate)
        {
            _saved[(name, id)] = fd;
            _changes++;
        }
        return new Registration(() =>
        {
            lock (_gate)
            {
                // One of the same key may have come since, as when an id is tried twice.
                if (!_saved.TryGetValue((name, id), out OwnedFd? now) || !ReferenceEquals(now, fd)) return;
                _saved.Remove((name, id));
                _changes++;
            }
        });
    }

    /// <summary>Enters the ids of an IOMMUFD device.</summary>
    /// <param name="device">The ids.</param>
    /// <returns>Dispose to remove them.</returns>
    internal IDisposable Save(CprIommufdDevice device)
    {
        ArgumentNullException.ThrowIfNull(device);
        lock (_gate) _devices[device.Name] = device;
        return new Registration(() => { lock (_gate) _devices.Remove(device.Name); });
    }

    /// <summary>What the next process is to get.</summary>
    /// <returns>Descriptors, which stay their owners'.</returns>
    internal IReadOnlyList<CprFd> Entries()
    {
        lock (_gate) return [.. _saved.Select(static e => new CprFd(e.Key.Name, e.Key.Id, e.Value))];
    }

    /// <summary>IOMMUFD devices that the next process is to get.</summary>
    /// <returns>Their ids.</returns>
    internal IReadOnlyList<CprIommufdDevice> Devices()
    {
        lock (_gate) return [.. _devices.Values];
    }

    /// <summary>Closes what nobody asked for.</summary>
    /// <returns>Keys of the descriptors that were closed.</returns>
    internal IReadOnlyList<string> CloseUnclaimed()
    {
        lock (_gate)
        {
            string[] keys = [.. _received.Keys.Select(static k => $"'{k.Name}' {k.Id}")];
            foreach (OwnedFd fd in _received.Values) fd.Dispose();
            _received.Clear();
            return keys;
        }
    }

    /// <summary>Raised once a VM that came from another process is this one's, before it starts. BQL: held.</summary>
    public event Action? Arrived;

    /// <summary>The VM has arrived: devices own what they have and behave as ever. BQL: held.</summary>
    /// <exception cref="Exception">What a device threw; the others have arrived all the same.</exception>
    internal void EndIncoming()
    {
        if (!IsIncoming) return;
        IncomingMode = null;
        // Not before: vectors are claimed when the stream says which are in use.
        CloseUnclaimed();
        Each.Call(Arrived?.GetInvocationList() ?? [], static one => ((Action)one)());
    }

    /// <summary>Whether a descriptor was received and not taken yet.</summary>
    /// <param name="name">Name.</param>
    /// <param name="id">Number.</param>
    /// <returns>True if <see cref="Take"/> would find it.</returns>
    public bool Has(string name, int id)
    {
        lock (_gate) return _received.ContainsKey((name, id));
    }

    /// <summary>Closes what was received and not taken.</summary>
    public void Dispose() => CloseUnclaimed();
}
