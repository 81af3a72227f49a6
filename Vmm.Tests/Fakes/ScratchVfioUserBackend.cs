using Vmm.Core.Errors;
using Vmm.Core.Pci;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Tests.Fakes;

/// <summary>The device of the captures' scratch servers: BAR0 is plain memory; with MSI-X, BAR1 holds table and PBA. It cannot migrate.</summary>
internal sealed class ScratchVfioUserBackend(uint bar0Bytes, bool hasMsix, bool isMappable) : IVfioUserBackend
{
    private const uint Bar0 = 0, Bar1 = 1;
    private readonly VfioUserMemory _memory = new("scratch", bar0Bytes);
    private VfioUserPciConfig _config = null!;

    public string TypeName => "scratch";

    public IReadOnlyList<VfioUserRegion> Regions { get; private set; } = [];

    public VfioMigrationFlags MigrationFlags => VfioMigrationFlags.None;

    internal VfioUserHost Host { get; private set; } = null!;

    internal ScratchVfioUserBackend Build()
    {
        var bar0 = new VfioUserRegion { Index = Bar0, SizeBytes = bar0Bytes, Memory = isMappable ? _memory : null, Areas = isMappable ? [new(0x1000, 0x1000)] : [] };
        var config = new VfioUserRegion { Index = VfioPciRegion.Config, SizeBytes = VfioUserPciConfig.Length };
        Regions = hasMsix ? [bar0, new VfioUserRegion { Index = Bar1, SizeBytes = 0x1000 }, config] : [bar0, config];
        return this;
    }

    public uint GetIrqCount(uint index) => index switch { VfioPciIrq.Intx => 1, VfioPciIrq.Msix when hasMsix => 20, _ => 0 };

    public void Realize(VfioUserHost host)
    {
        Host = host;
        _config = new VfioUserPciConfig(host.Dma, 0x1b36, 0x0099, 0xff0000, hasIntx: true);
        _config.SetSubsystem(0x1b36, 0x1100);
        _config.SetRevision(1);
        _config.AddBar((int)Bar0, bar0Bytes);
        if (!hasMsix) return;
        _config.AddBar((int)Bar1, 0x1000);
        _config.AddMsix(PciRegisters.HeaderBytes, new MsixLayout(20, (int)Bar1, 0, (int)Bar1, 0x800));
    }

    public void RegionRead(uint index, ulong offset, Span<byte> destination)
    {
        if (index == Bar0) _memory.Slice(offset, destination.Length).CopyTo(destination);
        else if (index == VfioPciRegion.Config) _config.Read(offset, destination);
    }

    public void RegionWrite(uint index, ulong offset, ReadOnlySpan<byte> source)
    {
        if (index == Bar0) source.CopyTo(_memory.Slice(offset, source.Length));
        else if (index == VfioPciRegion.Config) _config.Write(offset, source);
    }

    public ValueTask<Errno> Quiesce() => ValueTask.FromResult(Errno.None);

    public void Unquiesce()
    {
    }

    public ValueTask<Errno> Reset(VfioUserResetReason reason)
    {
        _config.Reset();
        return ValueTask.FromResult(Errno.None);
    }

    public void ClientLost()
    {
    }

    public ValueTask<Errno> Transition(VfioDeviceState from, VfioDeviceState to) => ValueTask.FromResult(Errno.EINVAL);

    public IVfioUserSave OpenSave() => throw new InvalidOperationException();

    public IVfioUserLoad OpenLoad() => throw new InvalidOperationException();

    public void Dispose() => _memory.Dispose();
}
