using System.Diagnostics;

namespace Vmm.Core.RunStates;

/// <summary>
/// The one big lock of a VM (QEMU: BQL). A thread may take it again while it holds it. No thread holds it while it waits for a peer, except
/// between the stop of the VM and the end of the device state. Lock order: THREADS.md.
/// </summary>
public sealed class Bql
{
    private readonly Lock _lock = new();

    /// <summary>True if the calling thread holds the lock.</summary>
    public bool IsHeld => _lock.IsHeldByCurrentThread;

    /// <summary>Takes the lock; the same thread releases it by disposing the result.</summary>
    public Lock.Scope Acquire() => _lock.EnterScope();

    /// <summary>
    /// Tries to take the lock until a timeout, for a thread that the lock's holder may wait for. Release it with <see cref="Exit"/>.
    /// </summary>
    /// <returns>False after the timeout.</returns>
    public bool TryEnter(TimeSpan timeout) => _lock.TryEnter(timeout);

    /// <summary>Releases the lock after <see cref="TryEnter"/>.</summary>
    public void Exit() => _lock.Exit();

    /// <summary>Asserts in debug builds that the lock is held.</summary>
    [Conditional("DEBUG")]
    public void AssertHeld() => Debug.Assert(IsHeld, "the BQL must be held here");

    /// <summary>Asserts in debug builds that the lock is not held.</summary>
    [Conditional("DEBUG")]
    public void AssertNotHeld() => Debug.Assert(!IsHeld, "the BQL must not be held here");
}
