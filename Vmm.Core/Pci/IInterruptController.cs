namespace Vmm.Core.Pci;

/// <summary>A message-signalled interrupt: the write that raises it.</summary>
/// <param name="Address">Where to.</param>
/// <param name="Data">What.</param>
public readonly record struct MsiMessage(ulong Address, uint Data);

/// <summary>Takes the interrupts of PCI functions. BQL: held for every call.</summary>
public interface IInterruptController
{
    /// <summary>Sets a line that the functions share; called when its level changes.</summary>
    /// <param name="line">0 to 3, after the swizzle.</param>
    /// <param name="level">Asserted.</param>
    void SetIntx(int line, bool level);

    /// <summary>Delivers a message.</summary>
    /// <param name="message">The write.</param>
    /// <param name="requesterId">Bus, slot and function of the sender.</param>
    void SendMsi(MsiMessage message, ushort requesterId);
}

/// <summary>
/// The product's controller: hands interrupts to whoever runs the vCPUs, and counts what nobody takes. BQL: held for every call.
/// </summary>
public sealed class InterruptRouter : IInterruptController
{
    private readonly bool[] _levels = new bool[PciHost.IntxLines];
    private IInterruptController? _target;

    /// <summary>Messages that nobody took.</summary>
    public long DroppedMsi { get; private set; }

    /// <summary>Rising edges of lines that nobody took.</summary>
    public long DroppedIntx { get; private set; }

    /// <summary>Present level of a line.</summary>
    /// <param name="line">0 to 3.</param>
    /// <returns>Whether it is asserted.</returns>
    public bool Level(int line) => _levels[line];

    /// <summary>Sends interrupts to a target, which is told the present levels at once.</summary>
    /// <param name="target">The target; one at a time.</param>
    /// <returns>Dispose to detach it.</returns>
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
