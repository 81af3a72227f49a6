using Vmm.Core;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// What the migratable VFIO devices of one VM share: the rule that several of them must all speak P2P, and one dirty log for each container.
/// Scoped: one per VM. BQL: held.
/// </summary>
internal sealed class VfioMigrationHost(IDeviceServices services)
{
    private readonly List<VfioMigration> _devices = [];
    private readonly Dictionary<IVfioContainer, (ContainerDirtyLog Log, IDisposable Registration)> _logs = [];
    private IDisposable? _blocker;

    /// <summary>Migratable devices in the order they were realized.</summary>
    internal IReadOnlyList<VfioMigration> Devices => _devices;

    internal IDisposable Add(VfioMigration device)
    {
        IVfioContainer container = device.Io.Container;
        _devices.Add(device);
        try
        {
            UpdateBlocker(device);
            if (!_logs.ContainsKey(container))
            {
                var log = new ContainerDirtyLog(container, () => [.. _devices.Where(d => ReferenceEquals(d.Io.Container, container))], device.Logger);
                _logs[container] = (log, services.Memory.AddDirtyLogSource(log));
            }
        }
        catch
        {
            Remove(device);
            throw;
        }
        return new Registration(() => Remove(device));
    }

    private void Remove(VfioMigration device)
    {
        _devices.Remove(device);
        IVfioContainer container = device.Io.Container;
        if (!_devices.Exists(d => ReferenceEquals(d.Io.Container, container)) && _logs.Remove(container, out (ContainerDirtyLog Log, IDisposable Registration) log))
            log.Registration.Dispose();
        UpdateBlocker();
    }

    /// <summary>
    /// Blocks the migration of several devices unless all have P2P: devices that may do DMA to each other cannot be stopped one by one
    /// (vfio-migration 3.1.7; QEMU: <c>vfio_block_multiple_devices_migration</c>).
    /// </summary>
    /// <param name="added">The new device, which is refused if it must be able to migrate; null when a device has gone.</param>
    /// <exception cref="VfioException">It is refused.</exception>
    private void UpdateBlocker(VfioMigration? added = null)
    {
        VfioMigration? without = _devices.Count > 1 ? _devices.Find(static d => (d.Protocol!.Flags & VfioMigrationFlags.P2P) == 0) : null;
        if (without is null)
        {
            _blocker?.Dispose();
            _blocker = null;
            return;
        }
        if (added?.Options.Enable == VfioEnableMigration.On)
            throw new VfioException($"device '{added.Id}' ({added.Io.Name}): {OnlyP2P(without)}, and enable-migration=on was asked for", Errno.EOPNOTSUPP);
        _blocker ??= services.Blockers.Add(OnlyP2P(without), MigrationModes.Normal);
    }

    private static string OnlyP2P(VfioMigration without) => $"several VFIO devices migrate together only if all support P2P, and device '{without.Id}' does not";
}
