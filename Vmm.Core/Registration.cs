namespace Vmm.Core;

/// <summary>What a method that registers something returns: the first <see cref="Dispose"/> undoes it, a later one does nothing. Thread-safe.</summary>
/// <param name="undo">Runs once, on the disposing thread.</param>
public sealed class Registration(Action undo) : IDisposable
{
    private Action? _undo = undo;

    /// <summary>Undoes.</summary>
    public void Dispose() => Interlocked.Exchange(ref _undo, null)?.Invoke();
}
