using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Devices.Vfio.Hosted;

/// <summary>
/// The state of a hosted VM: the sections that a migration of it would have, framed as QEMU frames them, and nothing else.
/// <code>
/// { u8 1 START | 4 FULL, be32 section id, counted string name, be32 instance, be32 version, body, footer }
/// { u8 2 PART | 3 END, be32 section id, body, footer }
/// footer: u8 0x7e, be32 section id
/// u8 0
/// </code>
/// Iterables give all they have while the VM is stopped: a snapshot is complete by itself (spec vfio-user S-37).
/// </summary>
internal static class HostedStream
{
    internal const byte Eof = 0, Start = 1, Part = 2, End = 3, Full = 4, Footer = 0x7e;

    /// <summary>Writes the state of a stopped VM. Takes the BQL as each role demands.</summary>
    internal static void Save(Vm vm, QemuFileWriter f)
    {
        var prepared = new List<SaveVmEntry>();
        try
        {
            using (vm.Bql.Acquire())
            {
                foreach (SaveVmEntry entry in vm.SaveVm.Entries().Where(static e => e.Handlers is not null))
                {
                    prepared.Add(entry);
                    entry.Handlers!.Setup?.SavePrepare();
                }
            }
            foreach (SaveVmEntry entry in vm.SaveVm.Entries()) Save(vm.Bql, entry, f);
            f.WriteByte(Eof);
            f.Flush();
        }
        finally
        {
            using (vm.Bql.Acquire())
                foreach (SaveVmEntry entry in prepared) entry.Handlers!.Setup?.SaveCleanup();
        }
    }

    private static void Save(Bql bql, SaveVmEntry entry, QemuFileWriter f)
    {
        if (entry.Handlers?.IsActive is { } active && !active()) return;
        if (entry.Handlers is { IsIterable: true } iterable)
        {
            Section(entry, Start, f, () => { using (bql.Acquire()) iterable.Setup?.SaveSetup(f, CancellationToken.None); });
            while (iterable.Live is { IsActiveIterate: true } live)
            {
                SaveProgress progress = SaveProgress.Done;
                Section(entry, Part, f, () => progress = live.SaveLiveIterate(f, IterateBudget.Unlimited));
                if (progress == SaveProgress.Done) break;
            }
            Section(entry, End, f, () => { using (bql.Acquire()) iterable.Live?.SaveLiveCompletePrecopy(f); });
        }
        using (bql.Acquire())
        {
            if (entry.VmState is { } state && state.IsNeeded()) Section(entry, Full, f, () => state.Save(f, null));
            else if (entry.Handlers?.State is { } handler) Section(entry, Full, f, () => handler.SaveState(f));
            f.Flush();
        }
    }

    private static void Section(SaveVmEntry entry, byte kind, QemuFileWriter f, Action body)
    {
        f.WriteByte(kind);
        f.WriteUInt32(entry.SectionId);
        if (kind is Start or Full)
        {
            f.WriteCountedString(entry.IdStr);
            f.WriteInt32(entry.InstanceId);
            f.WriteInt32(entry.VersionId);
        }
        body();
        f.WriteByte(Footer);
        f.WriteUInt32(entry.SectionId);
    }
}
