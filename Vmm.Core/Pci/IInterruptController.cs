namespace Vmm.Core.Pci;

/// <summary>A message-signalled interrupt, which is a write to memory.</summary>
/// <param name="Address">Address of the write on the bus.</param>
/// <param name="Data">The value written.</param>
public readonly record struct MsiMessage(ulong Address, uint Data);

/// <summary>Receives the interrupts of PCI functions. BQL: held for every call.</summary>
public interface IInterruptController
{
    /// <summary>Sets the level of a shared interrupt line; called only when the level changes.</summary>
    /// <param name="line">0 to 3, after the swizzle.</param>
    /// <param name="level">True if the line is asserted.</param>
    void SetIntx(int line, bool level);

    /// <summary>Delivers a message.</summary>
    /// <param name="message">Address and data of the write.</param>
    /// <param name="requesterId">Bus, slot and function of the sender.</param>
    void SendMsi(MsiMessage message, ushort requesterId);
}

/// <summary>
/// The product's controller: passes interrupts to the target that runs the vCPUs, and counts them while there is none. BQL: held for every call.
/// </summary>
public sealed class InterruptRouter : IInterruptController
{
    private readonly bool[] _levels = new bool[PciHost.IntxLines];
    private IInterruptController? _target;

    /// <summary>Number of messages that arrived without a target.</summary>
    public long DroppedMsi { get; private set; }

    /// <summary>Number of rising edges of lines that arrived without a target.</summary>
    public long DroppedIntx { get; private set; }

    /// <summary>Tells whether a line is asserted.</summary>
    /// <param name="line">0 to 3.</param>
    public bool Level(int line) => _levels[line];

    /// <summary>Attaches the target of all interrupts and tells it the present levels at once.</summary>
    /// <param name="target">Only one target can be attached at a time.</param>
    /// <returns>Dispose to detach it.</returns>
    /// <exception cref="InvalidOperationException">Another target is attached.</exception>
    public IDisposable Attach(IInterruptController target)
    {
        ArgumentNullException.ThrowIfNull(target);
        if (_target is not null) throw new InvalidOperationException("another interrupt target is attached");
        _target = target;
        for (int line = 0; line < _levels.Length; line++) target.SetIntx(line, _levels[line]);
        return new Registration(() => _target = null);
    }

    /// <inheritdoc/>
    public void SetIntx(int line, bool level)
    {
        if (level && !_levels[line] && _target is null) DroppedIntx++;
        _levels[line] = level;
        _target?.SetIntx(line, level);
    }

    /// <inheritdoc/>
    public void SendMsi(MsiMessage message, ushort requesterId)
    {
        if (_target is null) DroppedMsi++;
        else _target.SendMsi(message, requesterId);
    }
}
