namespace Vmm.Core;

/// <summary>An undo action that runs once.</summary>
/// <param name="undo">Runs on the first dispose.</param>
internal sealed class Registration(Action undo) : IDisposable
{
    private Action? _undo = undo;

    public void Dispose() => Interlocked.Exchange(ref _undo, null)?.Invoke();
}
