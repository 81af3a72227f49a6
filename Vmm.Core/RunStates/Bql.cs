using System.Diagnostics;

namespace Vmm.Core.RunStates;

/// <summary>
/// The one big lock of a VM (QEMU: BQL). Recursive for one thread. Never held while blocking on a peer, except between the stop of the VM and
/// the end of its device state. Lock order: THREADS.md.
/// </summary>
public sealed class Bql
{
    private readonly Lock _lock = new();

    /// <summary>True if the calling thread holds the lock.</summary>
    public bool IsHeld => _lock.IsHeldByCurrentThread;

    /// <summary>Takes the lock; leave it by disposing the result on the same thread.</summary>
    /// <returns>The scope.</returns>
    public Lock.Scope Acquire() => _lock.EnterScope();

    /// <summary>Takes the lock if it comes free in time; for a thread that its holder may be waiting for. Leave it with <see cref="Exit"/>.</summary>
    /// <param name="timeout">How long to wait.</param>
    /// <returns>False when somebody else held it all the time.</returns>
    public bool TryEnter(TimeSpan timeout) => _lock.TryEnter(timeout);

    /// <summary>Leaves the lock after <see cref="TryEnter"/>.</summary>
    public void Exit() => _lock.Exit();

    /// <summary>Asserts in debug builds that the lock is held.</summary>
    [Conditional("DEBUG")]
    public void AssertHeld() => Debug.Assert(IsHeld, "the BQL must be held here");

    /// <summary>Asserts in debug builds that the lock is not held.</summary>
    [Conditional("DEBUG")]
    public void AssertNotHeld() => Debug.Assert(!IsHeld, "the BQL must not be held here");
}
