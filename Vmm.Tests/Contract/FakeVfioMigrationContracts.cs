using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Tests.Fakes;

namespace Vmm.Tests.Contract;

/// <summary>The other tests trust the fake device, so it must keep the laws that real devices keep in the lab.</summary>
[TestFixture(VfioMigrationFlags.StopCopy)]
[TestFixture(VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P)]
[TestFixture(VfioMigrationFlags.StopCopy | VfioMigrationFlags.PreCopy)]
[TestFixture(VfioMigrationFlags.StopCopy | VfioMigrationFlags.P2P | VfioMigrationFlags.PreCopy)]
public sealed class FakeVfioMigrationContract(VfioMigrationFlags flags) : VfioMigrationContract
{
    private static readonly byte[] s_magic = [1, 2, 3, 4, 5, 6, 7, 8];
    private FakeVfioDevice _source = null!, _destination = null!;

    protected override VfioMigrationFlags Flags => flags;

    private protected override IVfioDeviceIo Source => _source;

    private protected override IVfioDeviceIo Destination => _destination;

    [SetUp]
    public void Open() => (_source, _destination) = (New("source"), New("destination"));

    [TearDown]
    public void Close()
    {
        _source.Dispose();
        _destination.Dispose();
    }

    private protected override byte[] Change(IVfioDeviceIo device) => ((FakeVfioDevice)device).State = [.. s_magic, 9, 8, 7, 6];

    private protected override byte[] Observe(IVfioDeviceIo device) => ((FakeVfioDevice)device).State;

    private FakeVfioDevice New(string name) => new(name, flags)
    {
        State = [.. s_magic, 0, 0, 0, 0],
        Accept = static loaded => loaded.Length == 12 && loaded.AsSpan(0, 8).SequenceEqual(s_magic) ? Errno.None : Errno.EINVAL,
    };
}
