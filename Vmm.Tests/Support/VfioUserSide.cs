using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Client;

namespace Vmm.Tests.Support;

/// <summary>One side of a migration without a VM: RAM at address 0, our vfio-user client, and a served device.</summary>
internal sealed class VfioUserSide : IDisposable
{
    private readonly ServedDevice _served;
    private readonly ulong _ramBytes;

    internal VfioUserSide(ServedDevice served, bool sharedRam, ulong ramBytes)
    {
        (_served, _ramBytes) = (served, ramBytes);
        Memory.AddBlock(new RamBlockOptions { Name = "ram", SizeBytes = ramBytes, IsShared = sharedRam });
        Io = VfioUserDeviceIo.Open(new VfioUserOptions { SocketPath = "pair" }, Memory, served.ConnectSocket());
        Io.SetBusMaster(true);
        Dirty = new ulong[(ramBytes / 4096 / 64) + 1];
    }

    internal VfioUserDeviceIo Io { get; }

    internal GuestMemory Memory { get; } = new();

    /// <summary>Bitmap of the pages that <see cref="Report"/> found dirty.</summary>
    internal ulong[] Dirty { get; }

    internal void Write(uint region, ulong offset, byte[] data) => Assert.That(Io.RegionWrite(region, offset, data), Is.EqualTo(Errno.None));

    internal void StartLog() => Assert.That(Io.StartDmaLog(4096, [new GuestRange(new GuestAddress(0), _ramBytes)], out _), Is.EqualTo(Errno.None));

    internal void Report() => Assert.That(Io.ReportDmaLog(new GuestRange(new GuestAddress(0), _ramBytes), 4096, Dirty), Is.EqualTo(Errno.None));

    /// <summary>Stops the device, reads the rest of its state (from the open session, if any), and reads the dirty log a last time.</summary>
    internal byte[] SaveStopped(IVfioMigrationData? open)
    {
        var stream = new List<byte>();
        byte[] buffer = new byte[60_000];
        Assert.That(Io.SetMigrationState(VfioDeviceState.StopCopy, out IVfioMigrationData? data), Is.EqualTo(Errno.None));
        data = open ?? data;
        for (int n = data!.Read(buffer, out _); n > 0; n = data.Read(buffer, out _)) stream.AddRange(buffer.AsSpan(0, n));
        Report();
        Assert.That((Io.StopDmaLog(), Io.SetMigrationState(VfioDeviceState.Stop, out _)), Is.EqualTo((Errno.None, Errno.None)));
        return [.. stream];
    }

    internal void Load(ReadOnlySpan<byte> stream)
    {
        Assert.That(Io.SetMigrationState(VfioDeviceState.Resuming, out IVfioMigrationData? data), Is.EqualTo(Errno.None));
        while (stream.Length > 0) stream = stream[data!.Write(stream, out _)..];
        Assert.That(Io.SetMigrationState(VfioDeviceState.Stop, out _), Is.EqualTo(Errno.None));
    }

    /// <summary>Copies the RAM of another side: all of it, or its dirty pages.</summary>
    internal void CopyRam(VfioUserSide from, ulong[]? dirty)
    {
        for (ulong i = 0; i < _ramBytes / 4096; i++)
            if (dirty is null || (dirty[i / 64] & (1UL << (int)(i % 64))) != 0) Memory.Write(new GuestAddress(i * 4096), from.ReadPage(i * 4096));
    }

    internal byte[] ReadPage(ulong address)
    {
        byte[] page = new byte[4096];
        Memory.Read(new GuestAddress(address), page);
        return page;
    }

    public void Dispose()
    {
        Io.Dispose();
        _served.Dispose();
        Memory.Dispose();
    }
}
