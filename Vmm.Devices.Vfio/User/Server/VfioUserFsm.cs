using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Devices.Vfio.User.Server;

/// <summary>
/// The migration state of one hosted device, and the open saving or resuming session (vfio-user 8, S-49, S-57, S-58). The arcs are data
/// (<see cref="VfioStateArcs"/>); when an arc fails, the state is that of the last completed arc. Session's thread; <see cref="State"/> from any.
/// </summary>
/// <param name="backend">The device.</param>
/// <param name="dma">The device's DMA, which stops with the device.</param>
internal sealed class VfioUserFsm(IVfioUserBackend backend, DmaMap dma) : IDisposable
{
    private volatile VfioDeviceState _state = VfioDeviceState.Running;
    private IVfioUserSave? _save;
    private IVfioUserLoad? _load;
    private Errno _sessionError;

    internal VfioDeviceState State => _state;

    internal bool IsMigratable => (backend.MigrationFlags & VfioMigrationFlags.StopCopy) != 0;

    /// <summary>Whether a session is open. For tests.</summary>
    internal bool HasSession => _save is not null || _load is not null;

    /// <summary>Saving sessions opened so far.</summary>
    internal int SaveCount { get; private set; }

    /// <summary>Resuming sessions opened so far.</summary>
    internal int LoadCount { get; private set; }

    /// <summary>Finds the path to a state from the present one.</summary>
    /// <returns>The states on the path; null when the request is invalid (EINVAL), empty when the device is there already.</returns>
    internal IReadOnlyList<VfioDeviceState>? Path(VfioDeviceState target) => VfioStateArcs.Path(_state, target, backend.MigrationFlags);

    /// <summary>Walks one arc.</summary>
    internal async ValueTask<Errno> Step(VfioDeviceState to)
    {
        VfioDeviceState from = _state;
        if (from == VfioDeviceState.Resuming)
        {
            // Leaving RESUMING ends the data, whichever state was asked for (vfio-user S-38, S-53).
            Errno errno = _sessionError;
            if (errno == Errno.None) errno = await _load!.Commit();
            if (errno != Errno.None)
            {
                _sessionError = errno;
                return errno;
            }
        }
        Errno refused = await backend.Transition(from, to);
        if (refused != Errno.None)
        {
            // Not committed again: the state that was loaded is in the device already.
            if (from == VfioDeviceState.Resuming) _sessionError = refused;
            return refused;
        }
        Enter(from, to);
        return Errno.None;
    }

    /// <summary>Reads the saving session's next bytes, as many as fit; fewer only at the end (vfio-user S-36).</summary>
    internal int Read(Span<byte> destination, out Errno errno)
    {
        errno = _save is null ? Errno.EINVAL : _sessionError;
        if (errno != Errno.None) return -1;
        int have = 0;
        while (have < destination.Length)
        {
            int n = ReadState(destination[have..], out errno);
            if (n < 0)
            {
                _sessionError = errno;
                return -1;
            }
            if (n == 0) break;
            have += n;
        }
        return have;
    }

    /// <summary>Keeps the error of a device that throws, so that later reads fail too and do not look like the end of the data.</summary>
    private int ReadState(Span<byte> destination, out Errno errno)
    {
        try
        {
            return _save!.ReadState(destination, out errno);
        }
        catch (VmmException e)
        {
            _sessionError = e.Errno == Errno.None ? Errno.EIO : e.Errno;
            throw;
        }
    }

    /// <summary>Gets the saving session's next bytes without a copy, if the session can.</summary>
    internal bool TryTake(int count, out ReadOnlyMemory<byte> bytes)
    {
        bytes = default;
        return count > 0 && _save is not null && _sessionError == Errno.None && _save.TryTake(count, out bytes);
    }

    /// <summary>Passes bytes to the resuming session, which takes no more after a refusal (vfio-user S-56).</summary>
    internal Errno Write(ReadOnlySpan<byte> source)
    {
        if (_load is null) return Errno.EINVAL;
        if (_sessionError == Errno.None && !source.IsEmpty) _sessionError = _load.WriteState(source);
        return _sessionError;
    }

    /// <summary>DEVICE_RESET: disposes the session, resets the device and lets it run (vfio-user S-35).</summary>
    internal async ValueTask<Errno> Reset(VfioUserResetReason reason)
    {
        Discard();
        Errno errno = await backend.Reset(reason);
        Set(errno == Errno.None ? VfioDeviceState.Running : VfioDeviceState.Error);
        return errno;
    }

    /// <summary>
    /// Called when the client is gone: disposes the session and lets the device run (vfio-user S-33, S-50). The device keeps its state, unless a load
    /// was not finished.
    /// </summary>
    internal async ValueTask<Errno> Recover()
    {
        if (_state is VfioDeviceState.Resuming or VfioDeviceState.Error) return await Reset(VfioUserResetReason.LoadAborted);
        foreach (VfioDeviceState next in Path(VfioDeviceState.Running) ?? [])
        {
            Errno errno = await Step(next);
            if (errno != Errno.None) return await Reset(VfioUserResetReason.LoadAborted);
        }
        return Errno.None;
    }

    public void Dispose() => Discard();

    private static bool IsStopped(VfioDeviceState state) =>
        state is VfioDeviceState.Stop or VfioDeviceState.StopCopy or VfioDeviceState.Resuming or VfioDeviceState.Error;

    private void Enter(VfioDeviceState from, VfioDeviceState to)
    {
        if (!VfioStateArcs.HasData(to)) Discard();
        Set(to);
        if (VfioStateArcs.OpensData(from, to))
        {
            _sessionError = Errno.None;
            if (to == VfioDeviceState.Resuming)
            {
                _load = backend.OpenLoad();
                LoadCount++;
            }
            else
            {
                _save = backend.OpenSave();
                SaveCount++;
            }
        }
        else if (to == VfioDeviceState.StopCopy)
        {
            _save!.StopCopy();
        }
    }

    private void Set(VfioDeviceState state)
    {
        _state = state;
        dma.SetStopped(IsStopped(state));
    }

    private void Discard()
    {
        _save?.Dispose();
        _load?.Dispose();
        (_save, _load, _sessionError) = (null, null, Errno.None);
    }
}
