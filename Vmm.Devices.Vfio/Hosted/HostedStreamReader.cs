using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Devices.Vfio.Hosted;

/// <summary>Reads what <see cref="HostedStream"/> writes into a VM that waits for it; a VM whose load failed is not to be used.</summary>
/// <param name="vm">The VM, in state inmigrate.</param>
/// <param name="f">The stream.</param>
internal sealed class HostedStreamReader(Vm vm, QemuFileReader f)
{
    private readonly Dictionary<uint, (SaveVmEntry Entry, int Version)> _bound = [];

    /// <summary>Reads all of the stream; nothing may be missing or left over. Takes the BQL as each role demands.</summary>
    /// <exception cref="VmmException">The stream is malformed, or of another device.</exception>
    internal void Load()
    {
        IReadOnlyList<SaveVmEntry> entries = vm.SaveVm.Entries();
        try
        {
            using (vm.Bql.Acquire())
                foreach (SaveVmEntry entry in entries) entry.Handlers?.Load?.LoadSetup(f);
            while (ReadSection())
            {
            }
            if (f.Peek(1).Length > 0) throw f.Bad("end", "the end of the stream", "more bytes");
            // A state that leaves a part of the device at power-on would be no state of that device.
            SaveVmEntry? missing = entries.FirstOrDefault(e => e.VmState is { } state && _bound.Values.All(b => b.Entry != e) && state.IsNeeded());
            if (missing is not null) throw new IncompatibleStateException($"the state has no section '{missing}'");
        }
        catch (Exception e) when (e is not VmmException)
        {
            throw new DeviceStateException($"section '{f.Section}': the device failed to load: {e.Message}", e);
        }
        finally
        {
            using (vm.Bql.Acquire())
                foreach (SaveVmEntry entry in entries) entry.Handlers?.Load?.LoadCleanup();
        }
    }

    private bool ReadSection()
    {
        f.Section = "framing";
        byte kind = f.ReadByte();
        if (kind == HostedStream.Eof) return false;
        if (kind > HostedStream.Full) throw f.Bad("section type", "0 to 4", $"{kind}");
        uint id = f.ReadUInt32();
        if (kind is HostedStream.Start or HostedStream.Full) Bind(id);
        if (!_bound.TryGetValue(id, out (SaveVmEntry Entry, int Version) section)) throw f.Bad("section id", "one that was announced", $"{id}");
        f.Section = section.Entry.ToString();
        LoadBody(section.Entry, section.Version, kind);
        byte footer = f.ReadByte();
        uint footerId = f.ReadUInt32();
        if (footer != HostedStream.Footer || footerId != id) throw f.Bad("footer", $"0x7e, id {id}", $"0x{footer:x2}, id {footerId}");
        return true;
    }

    private void Bind(uint id)
    {
        string name = f.ReadCountedString();
        f.Section = name;
        int instance = f.ReadInt32(), version = f.ReadInt32();
        SaveVmEntry entry = vm.SaveVm.Find(name, instance)
            ?? throw new IncompatibleStateException($"unknown section '{name}' instance {instance}: this device has none such");
        if (version > entry.VersionId || version < entry.MinimumVersionId)
            throw new IncompatibleStateException($"section '{entry}' has version {version}, versions {entry.MinimumVersionId} to {entry.VersionId} load here");
        if (_bound.TryGetValue(id, out (SaveVmEntry Entry, int Version) other) && other.Entry != entry) throw f.Bad("section id", "one of its own", $"{id}, which is '{other.Entry}'");
        _bound[id] = (entry, version);
    }

    private void LoadBody(SaveVmEntry entry, int version, byte kind)
    {
        if (entry.VmState is { } state)
        {
            if (kind != HostedStream.Full) throw f.Bad("section type", "FULL (4)", $"{kind}");
            using (vm.Bql.Acquire()) state.Load(f, version);
            return;
        }
        ILoadState load = entry.Handlers?.Load ?? throw new IncompatibleStateException($"section '{entry}' cannot be loaded here");
        if (kind != HostedStream.Full)
        {
            load.LoadState(f, version);
            return;
        }
        using (vm.Bql.Acquire()) load.LoadState(f, version);
    }
}
