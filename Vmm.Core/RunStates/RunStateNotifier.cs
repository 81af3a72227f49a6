using Vmm.Core.Errors;

namespace Vmm.Core.RunStates;

/// <summary>Hears when the VM starts or stops (QEMU: <c>qemu_add_vm_change_state_handler</c>). May throw; see <see cref="RunStateNotifier"/>.</summary>
public interface IVmStateHandler
{
    /// <summary>The VM is about to start, or has stopped. BQL: held.</summary>
    void OnVmStateChange(bool running, RunState state);
}

/// <summary>A handler with work that must precede every <see cref="IVmStateHandler.OnVmStateChange"/> (QEMU: <c>prepare_cb</c>).</summary>
public interface IVmStatePrepareHandler : IVmStateHandler
{
    /// <summary>Runs for all handlers before the first <see cref="IVmStateHandler.OnVmStateChange"/>. BQL: held.</summary>
    void OnVmStatePrepare(bool running, RunState state);
}

/// <summary>A part of a machine with an id of its own, which error messages name.</summary>
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

    /// <summary>True if the guest was suspended when the VM stopped; the next start then enters suspended (QEMU: <c>vm_was_suspended</c>).</summary>
    bool WasSuspended { get; }

    /// <summary>
    /// Stops the VM and enters a state, for a device that cannot let the guest go on (QEMU: <c>vm_stop</c>). A VM that does not run only changes
    /// its state. BQL: held.
    /// </summary>
    /// <param name="state">The state to enter, such as <see cref="RunState.InternalError"/>.</param>
    /// <exception cref="DeviceStateException">The transition is illegal; or handlers failed, and the VM has stopped nevertheless.</exception>
    void Stop(RunState state);

    /// <summary>
    /// Adds a handler. A start calls handlers by ascending priority and, within one priority, in order of registration; a stop uses the reverse order.
    /// </summary>
    /// <param name="handler">The handler.</param>
    /// <param name="priority">QEMU's device depth; 0 by default.</param>
    /// <returns>Dispose to remove it.</returns>
    IDisposable Register(IVmStateHandler handler, int priority = 0);
}

/// <summary>One change of the run state.</summary>
/// <param name="From">The state before the change.</param>
/// <param name="To">The state after it.</param>
public readonly record struct RunStateChange(RunState From, RunState To);

/// <summary>
/// Owns the run state of one VM and calls the handlers. Every change needs the BQL. The exception names each handler that failed. A stop always
/// enters its state and throws afterwards; a failed start tells all handlers to stop and keeps the old state. Both make a migration fail, because
/// a device whose state is unknown must not be saved.
/// </summary>
public sealed class RunStateNotifier(Bql bql) : IRunStateNotifier
{
    private readonly List<(IVmStateHandler Handler, int Priority, int Order)> _handlers = [];
    private int _order;
    private volatile RunState _state = RunState.PreLaunch;

    /// <inheritdoc/>
    public RunState State => _state;

    /// <inheritdoc/>
    public bool IsRunning => RunStateTable.IsRunning(_state);

    /// <inheritdoc cref="IRunStateNotifier.WasSuspended"/>
    public bool WasSuspended { get; set; }

    /// <summary>Raised after each change, on the thread that made it. BQL: held.</summary>
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

    /// <summary>Changes the state of a VM that stays stopped (QEMU: <c>runstate_set</c>). BQL: held.</summary>
    /// <param name="state">A state other than running that the present state may change to.</param>
    public void Set(RunState state)
    {
        bql.AssertHeld();
        Check(state);
        if (IsRunning != RunStateTable.IsRunning(state)) throw new InvalidOperationException($"'{_state.ToWireName()}' to '{state.ToWireName()}' needs a start or stop");
        Move(state);
    }

    /// <summary>
    /// Enters internal-error because a failed load left the stopped guest with parts of two states; only a reset or a successful load may follow.
    /// QEMU has no such transition and lets the guest run. BQL: held.
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
#pragma warning disable CA1031 // One failed handler must not keep the others from hearing of the change; its exception is reported with its name.
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
