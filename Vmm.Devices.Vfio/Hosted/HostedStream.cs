using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Devices.Vfio.Hosted;

/// <summary>
/// The state of a hosted VM: the sections that a migration of it would have, framed as <see cref="SaveStream"/> frames them, then EOF. Iterables
/// give all they have while the VM is stopped, because a snapshot must be complete by itself (vfio-user S-37).
/// </summary>
internal static class HostedStream
{
    /// <summary>Writes the state of a stopped VM. Takes the BQL as each role demands.</summary>
    /// <exception cref="VmmException">A device failed to save.</exception>
    internal static void Save(Vm vm, QemuFileWriter f)
    {
        var stream = new SaveStream(vm.SaveVm, f, new SaveContext { IsSnapshot = true });
        try
        {
            using (vm.Bql.Acquire())
            {
                stream.SavePrepare();
                stream.SaveSetup();
            }
            while (stream.SaveLiveIterate(IterateBudget.Unlimited) == SaveProgress.More) { }
            using (vm.Bql.Acquire())
            {
                stream.SaveLiveCompletePrecopy();
                stream.SaveState();
                f.Flush();
            }
            stream.WriteEof();
            f.Flush();
        }
        finally
        {
            stream.SaveCleanup();
        }
    }

    /// <summary>Length of the declared states of a VM as they are now. Takes the BQL.</summary>
    internal static ulong DeclaredBytes(Vm vm)
    {
        var counter = new SavePipe(ulong.MaxValue);
        counter.Lift();
        using var f = new QemuFileWriter(counter);
        using (vm.Bql.Acquire())
        {
            foreach (SaveVmEntry entry in vm.SaveVm.Entries())
                if (entry.VmState is { } state && state.IsNeeded()) state.Save(f);
        }
        return (ulong)f.Position;
    }

    /// <summary>Loads what <see cref="Save"/> wrote into a VM that waits for it; nothing may be missing or left over. Dispose a VM whose load failed.</summary>
    /// <param name="vm">The VM, in state inmigrate.</param>
    /// <param name="f">The stream.</param>
    /// <exception cref="VmmException">The stream is malformed, or of another device.</exception>
    internal static void Load(Vm vm, QemuFileReader f)
    {
        var stream = new LoadStream(vm.SaveVm, f, new LoadContext { IsSnapshot = true });
        try
        {
            stream.LoadSetup();
            stream.ReadSections();
            stream.ThrowIfIncomplete();
            if (f.Peek(1).Length > 0) throw f.Bad("end", "the end of the stream", "more bytes");
            // A section that is missing would leave a part of the device at its power-on values.
            SaveVmEntry? missing = vm.SaveVm.Entries().Except(stream.Announced).FirstOrDefault(static e => e.VmState is { } state && state.IsNeeded());
            if (missing is not null) throw new IncompatibleStateException($"the state has no section '{missing}'");
        }
        catch (Exception e) when (e is not VmmException)
        {
            throw new DeviceStateException($"section '{f.Section}': the device failed to load: {e.Message}", e);
        }
        finally
        {
            stream.LoadCleanup();
        }
    }
}
