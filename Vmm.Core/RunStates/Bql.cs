using System.Diagnostics;
using System.Runtime.CompilerServices;

namespace Vmm.Core.RunStates;

/// <summary>
/// The one big lock of a VM (QEMU: BQL). A thread may take it again while it holds it. No thread holds it while it waits for a peer, except
/// between the stop of the VM and the end of the device state. Thread-safe. Lock order: THREADS.md.
/// </summary>
public sealed class Bql
{
    /// <summary>Environment variable, 1 or 0, that switches <see cref="ChecksContracts"/> for a process and those that it starts.</summary>
    public const string CheckVariable = "VMM_CHECK_LOCKS";

    private readonly Lock _lock = new();

    /// <summary>
    /// Whether the lock contracts in the documentation are checked where they matter: on in tests (<see cref="CheckVariable"/>, or the runtime
    /// setting <c>Vmm.CheckLocks</c>), off otherwise, when a check costs nothing.
    /// </summary>
    public static bool ChecksContracts { get; } =
        Environment.GetEnvironmentVariable(CheckVariable) is { } text ? text == "1" : AppContext.TryGetSwitch("Vmm.CheckLocks", out bool on) && on;

    /// <summary>True if the calling thread holds the lock.</summary>
    public bool IsHeld => _lock.IsHeldByCurrentThread;

    /// <summary>Takes the lock; the same thread releases it by disposing the result.</summary>
    public Lock.Scope Acquire() => _lock.EnterScope();

    /// <summary>
    /// Tries to take the lock until a timeout, for a thread that the lock's holder may wait for. Release it with <see cref="Exit"/>.
    /// </summary>
    /// <returns>True if the thread has the lock; false after the timeout.</returns>
    public bool TryEnter(TimeSpan timeout) => _lock.TryEnter(timeout);

    /// <summary>Releases the lock after <see cref="TryEnter"/>, on the same thread.</summary>
    /// <exception cref="SynchronizationLockException">The calling thread does not hold it.</exception>
    public void Exit() => _lock.Exit();

    /// <summary>Checks that the caller holds the lock, where <see cref="ChecksContracts"/> is on.</summary>
    /// <param name="member">The caller; filled in by the compiler.</param>
    /// <exception cref="InvalidOperationException">It is not held: a bug in the code that called the caller.</exception>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public void AssertHeld([CallerMemberName] string member = "")
    {
        if (ChecksContracts && !IsHeld) Broken(member, "held");
    }

    /// <summary>Checks that the caller does not hold the lock, where <see cref="ChecksContracts"/> is on.</summary>
    /// <param name="member">The caller; filled in by the compiler.</param>
    /// <exception cref="InvalidOperationException">It is held: a bug in the code that called the caller.</exception>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public void AssertNotHeld([CallerMemberName] string member = "")
    {
        if (ChecksContracts && IsHeld) Broken(member, "not held");
    }

    [StackTraceHidden]
    private static void Broken(string member, string expected) => throw new InvalidOperationException($"lock contract broken: {member} needs the BQL {expected}");
}
