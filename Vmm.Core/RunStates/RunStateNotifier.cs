using Vmm.Core.Errors;

namespace Vmm.Core.RunStates;

/// <summary>
/// Hears when the VM starts or stops (QEMU: <c>qemu_add_vm_change_state_handler</c>). It may throw. A stop then tells the others and reaches its state. A
/// start ends at the first handler that throws, and every handler is told to stop, also one that was not yet told to start.
/// </summary>
public interface IVmStateHandler
{
    /// <summary>The VM is about to start, or has stopped. BQL: held.</summary>
    /// <param name="running">True for a start.</param>
    /// <param name="state">The state that the VM enters; when another handler refused a start, and <paramref name="running"/> is false, the one that it keeps.</param>
    void OnVmStateChange(bool running, RunState state);

    /// <summary>
    /// Throws if a start would fail now, and changes nothing. A destination asks before it confirms a migration, because afterwards the source has let go. BQL:
    /// held.
    /// </summary>
    /// <exception cref="VmmException">Why the handler could not start.</exception>
    void ThrowIfCannotStart()
    {
    }

    /// <summary>Runs for all handlers before the first <see cref="OnVmStateChange"/> (QEMU: <c>prepare_cb</c>). BQL: held.</summary>
    void OnVmStatePrepare(bool running, RunState state)
    {
    }
}

/// <summary>A part of a machine with an id of its own, which error messages name.</summary>
public interface INamedPart
{
    /// <summary>Unique in its VM.</summary>
    string Id { get; }
}

/// <summary>The VM's run state, for devices. One per VM.</summary>
public interface IRunStateNotifier
{
    /// <summary>The present state. Any thread.</summary>
    RunState State { get; }

    /// <summary>True while the guest runs. Any thread.</summary>
    bool IsRunning { get; }

    /// <summary>The guest was suspended before it was stopped, so a later start leads to suspended (QEMU: <c>vm_was_suspended</c>).</summary>
    bool WasSuspended { get; internal set; }

    /// <summary>Raised after each change with the state left and the state entered, on the changing thread. BQL: held.</summary>
    event Action<RunState, RunState>? Changed;

    /// <summary>Starts the VM (QEMU: <c>vm_start</c>); embedders call <c>Vm.Cont</c>. BQL: held.</summary>
    /// <exception cref="DeviceStateException">Handlers failed; the VM is back in the state it had.</exception>
    internal void Start();

    /// <summary>Asks every handler whether it could start (<see cref="IVmStateHandler.ThrowIfCannotStart"/>). BQL: held.</summary>
    /// <exception cref="DeviceStateException">Names those that could not.</exception>
    internal void ThrowIfCannotStart();

    /// <summary>Changes the state of a VM that does not run (QEMU: <c>runstate_set</c>); no handler is called. BQL: held.</summary>
    /// <param name="state">A state that does not run, such as <see cref="RunState.Paused"/>.</param>
    /// <exception cref="DeviceStateException">The state cannot be reached from the present one.</exception>
    /// <exception cref="InvalidOperationException">The VM runs, or would have to run in <paramref name="state"/>.</exception>
    void Set(RunState state);

    /// <summary>
    /// Enters internal-error because the stopped guest's state is part old and part new: only a reset or a load that succeeds may follow. QEMU
    /// has no such transition and lets the guest run. BQL: held.
    /// </summary>
    /// <exception cref="InvalidOperationException">The guest runs.</exception>
    internal void EnterInternalError();

    /// <summary>
    /// Leaves the temporary state of an attempt (finish-migrate, save-vm, restore-vm) without a start; no handler is called. QEMU's table leads out of some
    /// of these states only for a guest that starts, so a guest that cannot start would stay there for ever. BQL: held.
    /// </summary>
    /// <param name="state">The state before the attempt, or paused for a guest that could not be started.</param>
    /// <exception cref="InvalidOperationException">The VM runs, or would have to run in <paramref name="state"/>.</exception>
    internal void Leave(RunState state);

    /// <summary>
    /// Raised when handlers failed in a start or a stop, with the reason, on the changing thread. A device may have lost its state, so an attempt that saves
    /// it must fail. BQL: held.
    /// </summary>
    internal event Action<DeviceStateException>? ChangeFailed;

    /// <summary>
    /// Stops the VM and enters a state, for a device that cannot let the guest go on (QEMU: <c>vm_stop</c>). A VM that does not run only changes
    /// its state. BQL: held.
    /// </summary>
    /// <param name="state">The state to enter, such as <see cref="RunState.InternalError"/>.</param>
    /// <exception cref="DeviceStateException">The transition is illegal; or handlers failed, and the VM has stopped nevertheless.</exception>
    void Stop(RunState state);

    /// <summary>
    /// Adds a handler. A start calls handlers by ascending priority and, within one priority, in order of registration; a stop uses the reverse order. Any
    /// thread; takes the BQL.
    /// </summary>
    /// <param name="handler">It hears of starts and stops from now on; a running VM is not announced.</param>
    /// <param name="priority">QEMU's device depth; 0 by default.</param>
    /// <returns>Dispose to remove it.</returns>
    IDisposable Register(IVmStateHandler handler, int priority = 0);
}

/// <summary>
/// Owns the run state of one VM and calls the handlers. Every change needs the BQL. The exception names each handler that failed. A stop always
/// enters its state and throws afterwards; a start ends at the first failure, so that no vCPU runs beside a device that did not start, tells all handlers
/// to stop and keeps the old state. Both make a migration fail (<see cref="ChangeFailed"/>), because a device whose state is unknown must not be saved.
/// </summary>
internal sealed class RunStateNotifier(Bql bql) : IRunStateNotifier
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
    public event Action<RunState, RunState>? Changed;

    /// <inheritdoc cref="IRunStateNotifier.ChangeFailed"/>
    public event Action<DeviceStateException>? ChangeFailed;

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

    /// <inheritdoc/>
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
        List<Exception> errors = Tell(true, static h => h.OnVmStatePrepare(true, RunState.Running));
        if (errors.Count == 0)
        {
            Move(RunState.Running, notify: false);
            errors = Tell(true, static h => h.OnVmStateChange(true, RunState.Running));
            if (errors.Count == 0) { Changed?.Invoke(before, RunState.Running); return; }
            _state = before;
        }
        // An attempt's own state would tell a device that the attempt goes on.
        RunState stopped = before is RunState.FinishMigrate or RunState.SaveVm or RunState.RestoreVm ? RunState.Paused : before;
        Tell(false, h => h.OnVmStateChange(false, stopped));
        throw Failed("start", errors);
    }

    /// <inheritdoc cref="IRunStateNotifier.ThrowIfCannotStart"/>
    public void ThrowIfCannotStart()
    {
        bql.AssertHeld();
        List<Exception> errors = Tell(true, static h => h.ThrowIfCannotStart());
        if (errors.Count > 0) throw Described("start", errors);
    }

    /// <inheritdoc/>
    public void Stop(RunState state)
    {
        bql.AssertHeld();
        RunState before = _state;
        Check(state);
        if (before == RunState.Suspended && state != RunState.Suspended) WasSuspended = true;
        if (!RunStateTable.IsRunning(before)) { Move(state); return; }
        List<Exception> errors = Tell(false, h => h.OnVmStatePrepare(false, state));
        Move(state, notify: false);
        errors.AddRange(Tell(false, h => h.OnVmStateChange(false, state)));
        Changed?.Invoke(before, state);
        if (errors.Count > 0) throw Failed("stop", errors);
    }

    /// <inheritdoc/>
    public void Set(RunState state)
    {
        bql.AssertHeld();
        Check(state);
        if (IsRunning != RunStateTable.IsRunning(state)) throw new InvalidOperationException($"'{_state.ToWireName()}' to '{state.ToWireName()}' needs a start or stop");
        Move(state);
    }

    /// <inheritdoc/>
    public void Leave(RunState state)
    {
        bql.AssertHeld();
        if (IsRunning || RunStateTable.IsRunning(state)) throw new InvalidOperationException($"'{_state.ToWireName()}' to '{state.ToWireName()}' needs a start or stop");
        Move(state);
    }

    /// <inheritdoc/>
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
        if (notify && before != to) Changed?.Invoke(before, to);
    }

    /// <summary>Tells the handlers of a start, until one fails, or all handlers of a stop in reverse order.</summary>
    private List<Exception> Tell(bool isStart, Action<IVmStateHandler> call)
    {
        var errors = new List<Exception>();
        IVmStateHandler[] handlers = [.. _handlers.Select(static h => h.Handler)];
        if (!isStart) Array.Reverse(handlers);
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
                if (isStart) break;
            }
        }
        return errors;
    }

    private static string NameOf(IVmStateHandler handler) => handler is INamedPart part ? $"device '{part.Id}'" : handler.GetType().Name;

    private DeviceStateException Failed(string what, List<Exception> errors)
    {
        DeviceStateException failure = Described(what, errors);
        ChangeFailed?.Invoke(failure);
        return failure;
    }

    private static DeviceStateException Described(string what, List<Exception> errors) =>
        new($"could not {what} the VM: {string.Join("; ", errors.Select(static e => e.Message))}", errors.Count == 1 ? errors[0] : new AggregateException(errors));
}
