namespace Vmm.Core.SaveVm;

/// <summary>Bytes of device data that VFIO devices have sent in the current migration (QEMU: <c>mig_stats</c>, <c>VfioStats</c>). Thread-safe.</summary>
public sealed class DeviceTransferCounter
{
    private long _bytes;
    private volatile bool _isUsed;

    /// <summary>Bytes since <see cref="Reset"/>.</summary>
    public long Bytes => Interlocked.Read(ref _bytes);

    /// <summary>True when the VM has a device that counts here.</summary>
    public bool IsUsed
    {
        get => _isUsed;
        set => _isUsed = value;
    }

    /// <summary>Counts bytes sent.</summary>
    public void Add(long bytes) => Interlocked.Add(ref _bytes, bytes);

    /// <summary>Sets the counter to 0, at the start of a migration.</summary>
    public void Reset() => Interlocked.Exchange(ref _bytes, 0);
}
