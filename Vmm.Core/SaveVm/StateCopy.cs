using Vmm.Core.Channels;
using Vmm.Core.Wire;

namespace Vmm.Core.SaveVm;

/// <summary>
/// A copy of the state that a check overwrites (<see cref="LoadContext.ValidateOnly"/>): declared states, and those of objects that load in place. Sections
/// that make an object per attempt change nothing during a check. BQL: held.
/// </summary>
internal sealed class StateCopy : IDisposable
{
    private readonly SaveVmRegistry _registry;
    private readonly MemoryStreamChannel _channel = new();

    private StateCopy(SaveVmRegistry registry) => _registry = registry;

    /// <summary>Takes the copy.</summary>
    /// <exception cref="Errors.VmmException">A device failed to save; nothing has changed.</exception>
    public static StateCopy Take(SaveVmRegistry registry)
    {
        ArgumentNullException.ThrowIfNull(registry);
        var copy = new StateCopy(registry);
        try
        {
            using var f = new QemuFileWriter(copy._channel);
            var stream = new SaveStream(registry, f, new SaveContext { IsSnapshot = true }) { Only = IsOverwritten };
            stream.SavePrepare();
            stream.SaveState();
            stream.WriteEof();
            f.Flush();
            return copy;
        }
        catch
        {
            copy.Dispose();
            throw;
        }
    }

    /// <summary>Loads the copy into the devices, which have been reset before (<c>ResetType.UndoCheck</c>).</summary>
    /// <exception cref="Errors.VmmException">A device refused its own state.</exception>
    public void PutBack()
    {
        _channel.Rewind();
        var stream = new LoadStream(_registry, new QemuFileReader(_channel), new LoadContext { IsSnapshot = true }) { Only = IsOverwritten };
        stream.LoadSetup();
        stream.ReadSections();
    }

    /// <summary>Frees the copy.</summary>
    public void Dispose() => _channel.Dispose();

    private static bool IsOverwritten(SaveVmEntry entry) => entry.VmState is not null || entry.Handlers is { LoadsInPlace: true };
}
