using System.Diagnostics;

namespace Vmm.Tests.Faults;

/// <summary>
/// The proxies of one attempt and its fault. The pump that comes to the fault's place calls <see cref="Fire"/>; everything else asks here what has
/// happened so far. Thread-safe.
/// </summary>
internal sealed class FaultSession(Fault fault) : IDisposable
{
    private readonly List<ProxyConnection> _connections = [];
    private readonly TaskCompletionSource _fired = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly List<Timer> _timers = [];
    private int _data = -1, _spent;
    private long _firedAt;

    internal Fault Fault => fault;

    /// <summary>Marks of the main channel.</summary>
    internal StreamMarks Marks { get; } = new();

    /// <summary>Completes when the fault has happened.</summary>
    internal Task Fired => _fired.Task;

    /// <summary>When the fault happened, as <see cref="Stopwatch.GetTimestamp"/>; 0 if it has not.</summary>
    internal long FiredAt => Interlocked.Read(ref _firedAt);

    /// <summary>Does what no proxy can do: to processes and as an operator. Called on a pump's thread; must not wait for it.</summary>
    internal Action<Fault>? Operate { get; init; }

    /// <summary>True once all bytes of the destination's SHUT(0) have been sent on to the source.</summary>
    internal bool HasPassedConfirmation
    {
        get
        {
            lock (_connections) return Marks.ShutValue == 0 && _connections.Exists(c => c.Role == Role.Main && c.Sent(Direction.Back) >= Marks.Shut + 8);
        }
    }

    internal void Add(ProxyConnection connection)
    {
        lock (_connections) _connections.Add(connection);
    }

    /// <summary>The number of a channel of multifd, in the order of arrival.</summary>
    internal Role NextData() => Interlocked.Increment(ref _data) == 0 ? Role.Data0 : Role.Data1;

    /// <summary>The position at which a pump must stop, because the fault happens there; null while it is not known, or when it lies elsewhere.</summary>
    internal long? Place(Role role, Direction direction)
    {
        if (Volatile.Read(ref _spent) != 0 || fault.Action == FaultAction.None || fault.Role != role || fault.Direction != direction) return null;
        long anchor = fault.Anchor switch { Anchor.Devices => Marks.Devices, Anchor.End => Marks.End, Anchor.Shut => Marks.Shut, _ => 0 };
        return anchor < 0 ? null : Math.Max(0, anchor + fault.Offset);
    }

    /// <summary>Lets the fault happen, once.</summary>
    internal void Fire()
    {
        if (Interlocked.Exchange(ref _spent, 1) != 0) return;
        Interlocked.Exchange(ref _firedAt, Stopwatch.GetTimestamp());
        ProxyConnection[] hit;
        lock (_connections) hit = [.. _connections.Where(c => fault.Target is { } target ? c.Role == target : c.Role is not (Role.SourceDevice or Role.DestinationDevice))];
        foreach (ProxyConnection one in hit) one.Suffer(fault);
        if (fault.Action is FaultAction.Stall or FaultAction.StallBoth && fault.Ms != Fault.ForEver)
            lock (_timers) _timers.Add(new Timer(_ => { foreach (ProxyConnection one in hit) one.Resume(); }, null, fault.Ms, Timeout.Infinite));
        if (fault.Action >= FaultAction.FreezeSource) Operate?.Invoke(fault);
        _fired.TrySetResult();
    }

    /// <summary>What a new connection suffers: after a fault of all connections, and without end, the network stays as it is.</summary>
    internal Fault? Lasting => Volatile.Read(ref _spent) != 0 && fault.Target is null && fault.Action is FaultAction.StallBoth or FaultAction.LoseBoth && fault.Ms == Fault.ForEver ? fault : null;

    /// <summary>Ends the attempt: what was to go on later goes on now. The connections belong to their proxies.</summary>
    public void Dispose()
    {
        lock (_timers) _timers.ForEach(static t => t.Dispose());
        ProxyConnection[] all;
        lock (_connections) all = [.. _connections];
        foreach (ProxyConnection one in all) one.Resume();
    }
}
