namespace Vmm.Core.Devices;

/// <summary>Sixteen interrupt lines of the ISA bus, and who takes them. BQL: held for every call.</summary>
public sealed class IsaIrqs
{
    private readonly bool[] _levels = new bool[16];
    private Action<int, bool>? _target;

    /// <summary>Sets a line.</summary>
    /// <param name="line">0 to 15.</param>
    /// <param name="level">Asserted.</param>
    public void Set(int line, bool level)
    {
        _levels[line] = level;
        _target?.Invoke(line, level);
    }

    /// <summary>Sends changes to a target, which is told of asserted lines at once.</summary>
    /// <param name="target">Told line and level.</param>
    /// <returns>Dispose to detach it.</returns>
    public IDisposable Attach(Action<int, bool> target)
    {
        ArgumentNullException.ThrowIfNull(target);
        if (_target is not null) throw new InvalidOperationException("another interrupt target is attached");
        _target = target;
        for (int line = 0; line < _levels.Length; line++)
            if (_levels[line]) target(line, true);
        return new Registration(() => _target = null);
    }
}
