using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;

namespace Vmm.Core.Cpr;

/// <summary>A descriptor and the key under which the next process finds it (QEMU: <c>CprFd</c>).</summary>
/// <param name="Name">1 to 1023 bytes of ASCII.</param>
/// <param name="Id">Distinguishes descriptors of one name.</param>
/// <param name="Fd">Open; the owner of the list that holds this record owns it.</param>
internal sealed record CprFd(string Name, int Id, OwnedFd Fd);

/// <summary>Ids of an IOMMUFD device's objects; the next process cannot learn them from the descriptor (<c>iommufd</c>).</summary>
/// <param name="Name">Device name, a PCI address.</param>
/// <param name="DevId">Id of the bound device.</param>
/// <param name="IoasId">Id of the I/O address space.</param>
/// <param name="HwptId">Id of the hardware page table.</param>
internal sealed record CprIommufdDevice(string Name, int DevId, uint IoasId, uint HwptId);

/// <summary>What this process received from the process that ran the VM before it. Owns the descriptors until a VM takes them. One thread.</summary>
public sealed class CprIncoming : IDisposable
{
    /// <param name="mode">The CPR mode of the transfer.</param>
    /// <param name="fds">The descriptors; owned by the new object.</param>
    /// <param name="devices">IOMMUFD devices that the other process had open.</param>
    internal CprIncoming(MigrationMode mode, IReadOnlyList<CprFd> fds, IReadOnlyList<CprIommufdDevice> devices) => (Mode, Fds, Devices) = (mode, fds, devices);

    /// <summary><see cref="MigrationMode.CprTransfer"/> or <see cref="MigrationMode.CprExec"/>.</summary>
    public MigrationMode Mode { get; }

    internal IReadOnlyList<CprFd> Fds { get; }

    internal IReadOnlyList<CprIommufdDevice> Devices { get; }

    /// <summary>Copies the set for a second attempt: if the first VM made from this set fails, it closes the descriptors of this set.</summary>
    /// <returns>The same set with duplicated descriptors; the caller disposes it.</returns>
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

    /// <summary>Closes the descriptors that no VM took.</summary>
    public void Dispose()
    {
        foreach (CprFd fd in Fds) fd.Fd.Dispose();
    }
}

/// <summary>
/// The descriptors of one VM that outlive its process (vfio-migration 7.2; QEMU: <c>cpr_state.fds</c>). Code that opens a descriptor calls
/// <see cref="Take"/> first and <see cref="Save"/> afterwards, so that cold start and restart share one path. Thread-safe.
/// </summary>
public sealed class CprFdTable : IDisposable
{
    private readonly Lock _gate = new();
    private readonly Dictionary<(string Name, int Id), OwnedFd> _saved = [];
    private readonly Dictionary<(string Name, int Id), OwnedFd> _received = [];
    private long _changes;

    /// <summary>Grows with every descriptor that enters or leaves; a caller of <see cref="Entries"/> sees whether its list is still current.</summary>
    internal long Changes => Volatile.Read(ref _changes);

    /// <summary>
    /// True from the stop of a VM that another process takes over, and forever once that process has it: this process must not change memory and
    /// devices any more, because both processes share them. BQL: held for writes.
    /// </summary>
    public bool IsLeaving { get; set; }

    /// <summary>
    /// The CPR mode while this VM is being made from another process's descriptors; null for a cold start, and after the VM has arrived
    /// (QEMU: <c>cpr_get_incoming_mode</c>).
    /// </summary>
    public MigrationMode? IncomingMode { get; private set; }

    /// <summary>True while devices must reuse what they receive: no reset, no configuration, no new mappings (QEMU: <c>cpr_is_incoming</c>).</summary>
    public bool IsIncoming => IncomingMode is not null;

    /// <summary>Takes over the received descriptors. Call it before anything is opened.</summary>
    /// <param name="incoming">Owned by this table from here on. If two descriptors have the same key, the table keeps the first.</param>
    internal void Receive(CprIncoming incoming)
    {
        ArgumentNullException.ThrowIfNull(incoming);
        lock (_gate)
        {
            IncomingMode = incoming.Mode;
            foreach (CprFd one in incoming.Fds)
                if (!_received.TryAdd((one.Name, one.Id), one.Fd)) one.Fd.Dispose();
        }
    }

    /// <summary>Finds a received descriptor and removes it from the table (QEMU: <c>cpr_find_fd</c>).</summary>
    /// <returns>The descriptor, which the caller owns; null if none was received.</returns>
    public OwnedFd? Take(string name, int id)
    {
        lock (_gate) return _received.Remove((name, id), out OwnedFd? fd) ? fd : null;
    }

    /// <summary>As <see cref="Take"/>, for a descriptor that the device cannot do without.</summary>
    /// <returns>The descriptor, which the caller owns.</returns>
    /// <exception cref="IncompatibleStateException">The process before this one did not send it.</exception>
    public OwnedFd Require(string name, int id) => Take(name, id)
        ?? throw new IncompatibleStateException($"the process before this one handed over no descriptor '{name}' {id}")
        {
            Hint = "both processes need the same devices with the same ids",
        };

    /// <summary>Adds a descriptor for the next process (QEMU: <c>cpr_save_fd</c>).</summary>
    /// <param name="name">1 to 1023 bytes of ASCII.</param>
    /// <param name="id">Distinguishes descriptors of one name.</param>
    /// <param name="fd">Stays the caller's, who removes it from the table before closing it.</param>
    /// <returns>Dispose to remove it (QEMU: <c>cpr_delete_fd</c>). A later descriptor with the same key replaces it.</returns>
    /// <exception cref="ArgumentException">The name is empty.</exception>
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
                // Another device may have saved a descriptor under the same key since, e.g. one whose id is in use.
                if (!_saved.TryGetValue((name, id), out OwnedFd? now) || !ReferenceEquals(now, fd)) return;
                _saved.Remove((name, id));
                _changes++;
            }
        });
    }

    /// <summary>Lists the descriptors for the next process.</summary>
    /// <returns>The descriptors; their owners keep them.</returns>
    internal IReadOnlyList<CprFd> Entries()
    {
        lock (_gate) return [.. _saved.Select(static e => new CprFd(e.Key.Name, e.Key.Id, e.Value))];
    }

    /// <summary>Closes the received descriptors that nobody took.</summary>
    /// <returns>Keys of the closed descriptors.</returns>
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

    /// <summary>Raised when this process has taken over a VM from another process, before the VM starts. BQL: held.</summary>
    public event Action? Arrived;

    /// <summary>Ends the takeover: devices own what they received and behave as after a cold start. BQL: held.</summary>
    /// <exception cref="Exception">A device's handler threw it; all other handlers have run nevertheless.</exception>
    internal void EndIncoming()
    {
        if (!IsIncoming) return;
        IncomingMode = null;
        // Not earlier: devices take the descriptors of their vectors only when the stream says which vectors are in use.
        CloseUnclaimed();
        Each.Call(Arrived?.GetInvocationList() ?? [], static one => ((Action)one)());
    }

    /// <summary>Tells whether the table holds a received descriptor that nobody took.</summary>
    /// <returns>True if <see cref="Take"/> would find it.</returns>
    public bool Has(string name, int id)
    {
        lock (_gate) return _received.ContainsKey((name, id));
    }

    /// <summary>Closes the received descriptors that nobody took.</summary>
    public void Dispose() => CloseUnclaimed();
}
