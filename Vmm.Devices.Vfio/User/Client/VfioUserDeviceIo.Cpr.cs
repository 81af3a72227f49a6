using Vmm.Core.Cpr;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>The connection changes process; the server notices nothing.</summary>
internal sealed partial class VfioUserDeviceIo : IVfioCprIo
{
    private IReadOnlyList<IDisposable> _entered = [];

    /// <inheritdoc/>
    public string? CprBlockedReason => null;

    /// <inheritdoc/>
    /// <remarks>From the transcript, where it must not be asked.</remarks>
    public bool AnswersProbes => true;

    /// <inheritdoc/>
    public void LoadCpr()
    {
        // The server has its maps and knows no addresses of ours.
    }

    /// <inheritdoc/>
    public void EnterCpr(CprFdTable table, string id) => _entered = _client.EndRecording().Enter(table, id);

    /// <inheritdoc/>
    public void SuspendCpr() => _client.Suspend();

    /// <inheritdoc/>
    public void ResumeCpr() => _client.Resume();

    /// <inheritdoc/>
    public void HandOverCpr() => _client.HandOver();

    private void LeaveCpr()
    {
        foreach (IDisposable one in _entered) one.Dispose();
        _entered = [];
    }
}
