using Vmm.Core.Devices;
using Vmm.Core.Memory;

namespace Vmm.Migration.Update;

/// <summary>
/// The small VM that a <see cref="MoveRehearsal"/> moves in place of the real one: RAM, and CPUs if the real one has them. A host whose VMs have
/// devices derives a class that adds devices of those types, so that their code is compiled too. <see cref="Dispose()"/> ends the servers of those devices.
/// One thread, of the rehearsal, makes all calls; an exception of a member ends the rehearsal. BQL: not held.
/// </summary>
/// <param name="real">The options of the VM that is to move.</param>
public class MoveStandIn(VmOptions real) : IDisposable
{
    private const ulong BootBytes = 3 << 20;

    // hlt; jmp back to it.
    private static readonly byte[] s_idle = [0xF4, 0xEB, 0xFD];

    /// <summary>The options of the stand-in; the rehearsal adds the options in which its two sides differ.</summary>
    public virtual VmOptions Options { get; } = new()
    {
        Memory = [new RamBlockOptions { Name = "ram", SizeBytes = BootBytes }],
        Accelerator = real.HasCpus ? real.Accelerator : "none",
        Cpus = real.HasCpus ? Math.Min(real.Cpus, 2) : 1,
        DirtyRingEntries = real.DirtyRingEntries,
        Kernel = real.HasCpus ? new KernelOptions { KernelPath = "idle", Image = s_idle } : null,
    };

    /// <summary>Called for each of the two VMs after it was made and before it runs.</summary>
    /// <param name="vm">The stand-in, not running yet.</param>
    public virtual void OnCreated(Vm vm)
    {
    }

    /// <summary>Called while the source runs; blocks until its guest has used its devices.</summary>
    /// <param name="vm">The source of the rehearsed move.</param>
    /// <param name="limit">Ends the wait.</param>
    public virtual void WaitUntilUsed(Vm vm, CancellationToken limit)
    {
    }

    /// <summary>Ends the servers of its devices. Called after both VMs are disposed.</summary>
    public void Dispose()
    {
        Dispose(true);
        GC.SuppressFinalize(this);
    }

    /// <summary>Releases what a derived class owns.</summary>
    /// <param name="disposing">Always true.</param>
    protected virtual void Dispose(bool disposing)
    {
    }
}
