using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>Gives a lost device a new server, at a reset of the VM.</summary>
internal sealed partial class VfioUserDeviceIo : IVfioReattach
{
    /// <inheritdoc/>
    public void Reattach()
    {
        VfioUserLink old = _link;
        if (old.Client.Fault is null) return;
        EndSession();
        // The old server has no use for the memory any more, and the new one gets all of it.
        _container.Detach();
        VfioUserLink link = OpenLink(_options, _container, _memory);
        try
        {
            if (link.Client.Fault is { } fault) throw new VfioException($"vfio-user '{Name}': the new server ended the connection", fault.Errno, fault);
            if (old.DifferenceTo(link) is { } difference) throw new VfioException($"vfio-user '{Name}': the new server has another device: {difference}", Errno.EINVAL);
        }
        catch
        {
            link.Dispose();
            throw;
        }
        old.Client.Lost -= OnLost;
        LeaveCpr();
        lock (_lostGate) _lost = null;
        // Not known until it was asked: the new server may have kept the state that a client left.
        (_link, _state, _logPageBytes) = (link, null, 0);
        link.Client.Lost += OnLost;
        if (link.Client.Fault is { } gone) OnLost(gone);
        if (_cpr is { } cpr) EnterCpr(cpr.Table, cpr.Id);
        old.Close();
    }
}
