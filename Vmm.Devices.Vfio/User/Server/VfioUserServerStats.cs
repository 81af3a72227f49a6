namespace Vmm.Devices.Vfio.User.Server;

/// <summary>Counters of one served device since it started. Any thread.</summary>
public sealed class VfioUserServerStats
{
    private long _sessions, _messages, _refusals, _posted, _dma, _saved, _loaded;

    /// <summary>Clients that connected and agreed on a version.</summary>
    public long Sessions => Interlocked.Read(ref _sessions);

    /// <summary>Commands received.</summary>
    public long Messages => Interlocked.Read(ref _messages);

    /// <summary>Commands that were answered with an error, or would have been.</summary>
    public long Refusals => Interlocked.Read(ref _refusals);

    /// <summary>Commands without a reply.</summary>
    public long Posted => Interlocked.Read(ref _posted);

    /// <summary>DMA_READ and DMA_WRITE sent.</summary>
    public long DmaMessages => Interlocked.Read(ref _dma);

    /// <summary>Bytes of device state read by clients.</summary>
    public long SavedBytes => Interlocked.Read(ref _saved);

    /// <summary>Bytes of device state written by clients.</summary>
    public long LoadedBytes => Interlocked.Read(ref _loaded);

    /// <inheritdoc/>
    public override string ToString() =>
        $"{Sessions} sessions, {Messages} messages ({Posted} posted, {Refusals} refused), {DmaMessages} DMA messages, state: {SavedBytes} bytes saved, {LoadedBytes} bytes loaded";

    internal void CountSession() => Interlocked.Increment(ref _sessions);

    internal void CountMessage(bool posted)
    {
        Interlocked.Increment(ref _messages);
        if (posted) Interlocked.Increment(ref _posted);
    }

    internal void CountRefusal() => Interlocked.Increment(ref _refusals);

    internal void CountDmaMessage() => Interlocked.Increment(ref _dma);

    internal void CountSaved(int bytes) => Interlocked.Add(ref _saved, bytes);

    internal void CountLoaded(int bytes) => Interlocked.Add(ref _loaded, bytes);
}
