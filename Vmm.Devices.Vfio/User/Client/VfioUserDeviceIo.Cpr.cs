using Vmm.Core.Cpr;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>Hands the connection to another process; the server does not notice.</summary>
internal sealed partial class VfioUserDeviceIo : IVfioCprIo
{
    private IReadOnlyList<IDisposable> _entered = [];
    private (CprFdTable Table, string Id)? _cpr;

    /// <inheritdoc/>
    public string? CprBlockedReason => null;

    /// <inheritdoc/>
    /// <remarks>Answered from the transcript while the server must not be asked.</remarks>
    public bool AnswersProbes => true;

    /// <inheritdoc/>
    public void LoadCpr()
    {
        // Nothing to do: the server keeps its maps, and does not know this process's addresses.
    }

    /// <inheritdoc/>
    public void EnterCpr(CprFdTable table, string id)
    {
        _cpr = (table, id);
        _entered = Client.EndRecording().Enter(table, id);
    }

    /// <inheritdoc/>
    public void SuspendCpr() => Client.Suspend();

    /// <inheritdoc/>
    public void ResumeCpr() => Client.Resume();

    /// <inheritdoc/>
    public void HandOverCpr() => Client.HandOver();

    private void LeaveCpr()
    {
        foreach (IDisposable one in _entered) one.Dispose();
        _entered = [];
    }
}
