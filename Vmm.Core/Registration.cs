namespace Vmm.Core;

/// <summary>
/// The result of a method that registers something. The first <see cref="Dispose"/> undoes the registration; later calls do nothing. Thread-safe.
/// </summary>
/// <param name="undo">Runs once, on the thread that disposes.</param>
public sealed class Registration(Action undo) : IDisposable
{
    private Action? _undo = undo;

    /// <summary>Undoes the registration.</summary>
    public void Dispose() => Interlocked.Exchange(ref _undo, null)?.Invoke();
}
