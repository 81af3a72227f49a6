namespace Vmm.Core.Devices;

/// <summary>The sixteen interrupt lines of the ISA bus, and the target that they are connected to. BQL: held for every call.</summary>
internal sealed class IsaIrqs
{
    private readonly bool[] _levels = new bool[16];
    private Action<int, bool>? _target;

    /// <summary>Sets the level of a line.</summary>
    /// <param name="line">0 to 15.</param>
    /// <param name="level">True to assert the line.</param>
    public void Set(int line, bool level)
    {
        _levels[line] = level;
        _target?.Invoke(line, level);
    }

    /// <summary>Attaches the target of all changes, which hears of asserted lines at once.</summary>
    /// <param name="target">Gets line and level.</param>
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
