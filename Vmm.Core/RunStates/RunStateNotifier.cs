using Vmm.Core.Errors;

namespace Vmm.Core.RunStates;

/// <summary>Told when the VM starts or stops (QEMU: <c>qemu_add_vm_change_state_handler</c>). May throw; see <see cref="RunStateNotifier"/>.</summary>
public interface IVmStateHandler
{
    /// <summary>The VM is about to run or has stopped. BQL: held.</summary>
    /// <param name="running">True on start.</param>
    /// <param name="state">The state being entered.</param>
    void OnVmStateChange(bool running, RunState state);
}

/// <summary>A handler with work that must precede everybody's main pass (QEMU: <c>prepare_cb</c>).</summary>
public interface IVmStatePrepareHandler : IVmStateHandler
{
    /// <summary>Runs for all handlers before the first <see cref="IVmStateHandler.OnVmStateChange"/>. BQL: held.</summary>
    /// <param name="running">True on start.</param>
    /// <param name="state">The state being entered.</param>
    void OnVmStatePrepare(bool running, RunState state);
}

/// <summary>A part of a machine with an id of its own, for error texts.</summary>
public interface INamedPart
{
    /// <summary>Unique in its VM.</summary>
    string Id { get; }
}

/// <summary>The VM's run state, for devices.</summary>
public interface IRunStateNotifier
{
    /// <summary>The present state. Any thread.</summary>
    RunState State { get; }

    /// <summary>True while the guest runs. Any thread.</summary>
    bool IsRunning { get; }

    /// <summary>The guest was suspended before it was stopped, so a later start leads to suspended (QEMU: <c>vm_was_suspended</c>).</summary>
    bool WasSuspended { get; }

    /// <summary>
    /// Stops the VM into a state, for a device with which the guest must not go on (QEMU: <c>vm_stop</c>). A VM that does not run only changes
    /// its state. BQL: held.
    /// </summary>
    /// <param name="state">The state to enter, such as <see cref="RunState.InternalError"/>.</param>
    /// <exception cref="DeviceStateException">The state cannot be reached from the present one; or handlers failed, and the VM is stopped all the same.</exception>
    void Stop(RunState state);

    /// <summary>Adds a handler. On start handlers run in ascending priority, on stop in descending; equal ones in order of registration, on stop reversed.</summary>
    /// <param name="handler">The handler.</param>
    /// <param name="priority">QEMU's device depth; 0 by default.</param>
    /// <returns>Dispose to remove it.</returns>
    IDisposable Register(IVmStateHandler handler, int priority = 0);
}

/// <summary>One change of the run state.</summary>
/// <param name="From">State left.</param>
/// <param name="To">State entered.</param>
public readonly record struct RunStateChange(RunState From, RunState To);

/// <summary>
/// Owns the run state of one VM and calls the handlers. All changes need the BQL. Handler failures are collected, each with its handler's
/// name. A stop always reaches its state, then throws; a failed start is undone (all handlers are told to stop) and leaves the old state.
/// Either way a migration in flight fails instead of going on with a device in an unknown state.
/// </summary>
/// <param name="bql">The VM's lock.</param>
public sealed class RunStateNotifier(Bql bql) : IRunStateNotifier
{
    private readonly List<(IVmStateHandler Handler, int Priority, int Order)> _handlers = [];
    private int _order;
    private volatile RunState _state = RunState.PreLaunch;

    /// <inheritdoc/>
    public RunState State => _state;

    /// <inheritdoc/>
    public bool IsRunning => RunStateTable.IsRunning(_state);

    /// <summary>The guest was suspended before it was stopped, so a later start leads to suspended (QEMU: <c>vm_was_suspended</c>).</summary>
    public bool WasSuspended { get; set; }

    /// <summary>Raised after each change, on the changing thread, BQL held.</summary>
    public event Action<RunStateChange>? Changed;

    /// <inheritdoc/>
    public IDisposable Register(IVmStateHandler handler, int priority = 0)
    {
        ArgumentNullException.ThrowIfNull(handler);
        using (bql.Acquire())
        {
            var entry = (handler, priority, _order++);
            _handlers.Add(entry);
            _handlers.Sort(static (a, b) => a.Priority != b.Priority ? a.Priority.CompareTo(b.Priority) : a.Order.CompareTo(b.Order));
            return new Registration(() => { using (bql.Acquire()) _handlers.Remove(entry); });
        }
    }

    /// <summary>Starts the VM (QEMU: <c>vm_start</c>). BQL: held.</summary>
    /// <exception cref="DeviceStateException">Handlers failed; the VM is back in the state it had.</exception>
    public void Start()
    {
        bql.AssertHeld();
        if (IsRunning) return;
        RunState before = _state;
        Check(RunState.Running);
        if (WasSuspended && RunStateTable.IsLegal(before, RunState.Suspended))
        {
            WasSuspended = false;
            Move(RunState.Suspended);
            return;
        }
        List<Exception> errors = Prepare(true, RunState.Running);
        if (errors.Count == 0)
        {
            Move(RunState.Running, notify: false);
            errors = Run(true, RunState.Running);
            if (errors.Count == 0) { Changed?.Invoke(new RunStateChange(before, RunState.Running)); return; }
            Run(false, before);
            _state = before;
        }
        throw Collected("start", errors);
    }

    /// <inheritdoc/>
    public void Stop(RunState state)
    {
        bql.AssertHeld();
        RunState before = _state;
        Check(state);
        if (before == RunState.Suspended && state != RunState.Suspended) WasSuspended = true;
        if (!RunStateTable.IsRunning(before)) { Move(state); return; }
        List<Exception> errors = Prepare(false, state);
        Move(state, notify: false);
        errors.AddRange(Run(false, state));
        Changed?.Invoke(new RunStateChange(before, state));
        if (errors.Count > 0) throw Collected("stop", errors);
    }

    /// <summary>Changes the state without starting or stopping (QEMU: <c>runstate_set</c>). BQL: held.</summary>
    /// <param name="state">A state that does not run; reached by a legal transition.</param>
    public void Set(RunState state)
    {
        bql.AssertHeld();
        Check(state);
        if (IsRunning != RunStateTable.IsRunning(state)) throw new InvalidOperationException($"'{_state.ToWireName()}' to '{state.ToWireName()}' needs a start or stop");
        Move(state);
    }

    /// <summary>
    /// Enters internal-error because the stopped guest's state is part old and part new: only a reset or a load that succeeds may follow. QEMU
    /// has no such transition and lets the guest run. BQL: held.
    /// </summary>
    /// <exception cref="InvalidOperationException">The guest runs.</exception>
    public void EnterInternalError()
    {
        bql.AssertHeld();
        if (IsRunning) throw new InvalidOperationException("a running VM cannot enter internal-error; stop it first");
        WasSuspended = false;
        Move(RunState.InternalError);
    }

    private void Check(RunState to)
    {
        if (!RunStateTable.IsLegal(_state, to))
            throw new DeviceStateException($"invalid run state transition: '{_state.ToWireName()}' to '{to.ToWireName()}'");
    }

    private void Move(RunState to, bool notify = true)
    {
        RunState before = _state;
        _state = to;
        if (notify && before != to) Changed?.Invoke(new RunStateChange(before, to));
    }

    private List<Exception> Prepare(bool running, RunState state) =>
        Each(running, h => (h as IVmStatePrepareHandler)?.OnVmStatePrepare(running, state));

    private List<Exception> Run(bool running, RunState state) => Each(running, h => h.OnVmStateChange(running, state));

    private List<Exception> Each(bool ascending, Action<IVmStateHandler> call)
    {
        var errors = new List<Exception>();
        IVmStateHandler[] handlers = [.. _handlers.Select(static h => h.Handler)];
        if (!ascending) Array.Reverse(handlers);
        foreach (IVmStateHandler handler in handlers)
        {
            try
            {
                call(handler);
            }
#pragma warning disable CA1031 // Whatever a handler throws is collected and reported with its name; the others must still be told.
            catch (Exception e)
#pragma warning restore CA1031
            {
                errors.Add(new DeviceStateException($"{NameOf(handler)}: {e.Message}", e));
            }
        }
        return errors;
    }

    private static string NameOf(IVmStateHandler handler) => handler is INamedPart part ? $"device '{part.Id}'" : handler.GetType().Name;

    private static DeviceStateException Collected(string what, List<Exception> errors) =>
        new($"could not {what} the VM: {string.Join("; ", errors.Select(static e => e.Message))}", errors.Count == 1 ? errors[0] : new AggregateException(errors));
}
