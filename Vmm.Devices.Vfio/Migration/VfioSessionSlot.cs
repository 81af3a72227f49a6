using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>Holds the one session that a device may have open, because the device itself has only one data stream. BQL: held.</summary>
internal sealed class VfioSessionSlot(string device)
{
    /// <summary>The open session, or null.</summary>
    internal object? Open { get; private set; }

    /// <summary>Makes a session and keeps it; nothing stays open when <paramref name="make"/> throws.</summary>
    /// <exception cref="VfioException">A session is open.</exception>
    internal T OpenNew<T>(Func<T> make) where T : class
    {
        if (Open is not null)
        {
            string what = Open is IVfioSaveSession ? "saved" : "loaded";
            throw new VfioException($"device '{device}' is being {what} by another attempt, which must end first", Errno.EBUSY);
        }
        T session = make();
        Open = session;
        return session;
    }

    /// <summary>Forgets a session; one that is not the open one changes nothing.</summary>
    internal void Close(object session)
    {
        if (ReferenceEquals(Open, session)) Open = null;
    }
}
