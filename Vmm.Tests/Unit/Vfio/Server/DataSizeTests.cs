using System.Buffers.Binary;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using Vmm.Tools.Devices;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>The server says how much state its device has, so that a client can keep its downtime limit (MIG_DATA_SIZE; vfio-user S-44).</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
internal sealed class DataSizeTests
{
    private const ulong RamBytes = 1 << 20;

    private static IEnumerable<TestCaseData> Devices()
    {
        yield return new TestCaseData((Func<IVfioUserBackend>)(static () => new DmaTestType().Create(DeviceOptions.Parse("dma-test,state-size=2M")))).SetArgDisplayNames("dma-test");
        yield return new TestCaseData((Func<IVfioUserBackend>)(static () => new GpioDevice())).SetArgDisplayNames("gpio");
        yield return new TestCaseData((Func<IVfioUserBackend>)(static () => new PciDeviceType<EduPlugin>(new EduDeviceFactory()).Create(DeviceOptions.Parse("edu")))).SetArgDisplayNames("edu");
    }

    [TestCaseSource(nameof(Devices))]
    public void TheSizeIsAboutThatOfTheState(Func<IVfioUserBackend> make)
    {
        using var side = new VfioUserSide(new ServedDevice(make()), sharedRam: true, RamBytes);
        ulong before = Size(side);
        side.StartLog();
        int length = side.SaveStopped(null).Length;
        Assert.That(before, Is.InRange((ulong)length / 2, ((ulong)length * 2) + 64), $"{length} bytes of state");
        Assert.That(Size(side), Is.InRange((ulong)length / 2, ((ulong)length * 2) + 64), "after a save");
    }

    [Test]
    public void ADeviceThatDoesNotKnowIsNotAsked()
    {
        using var served = new ServedDevice(new FakeVfioUserBackend());
        using RawVfioUserClient client = served.Attach();
        client.Fails(Errno.EINVAL, VfioUserCommand.DeviceFeature, Request(0x10009));
        client.Fails(Errno.EINVAL, VfioUserCommand.DeviceFeature, Request(0x40009));
    }

    [Test]
    public void TheAnswerIsTheEstimateAndNothingElseIsAllowed()
    {
        using var served = new ServedDevice(new FakeVfioUserBackend { StateEstimate = 0x1234_5678_9abc });
        using RawVfioUserClient client = served.Attach();
        foreach (VfioDeviceState state in (VfioDeviceState[])[VfioDeviceState.Running, VfioDeviceState.PreCopy, VfioDeviceState.StopCopy, VfioDeviceState.Stop])
        {
            client.SetState(state);
            Assert.That(BinaryPrimitives.ReadUInt64LittleEndian(client.Ok(VfioUserCommand.DeviceFeature, Request(0x10009)).AsSpan(8)), Is.EqualTo(0x1234_5678_9abcUL), $"{state}");
        }
        client.Fails(Errno.EINVAL, VfioUserCommand.DeviceFeature, Request(0x20009));
        client.Fails(Errno.EINVAL, VfioUserCommand.DeviceFeature, Request(0x10009, argsz: 15));
    }

    private static byte[] Request(uint flags, uint argsz = 16)
    {
        byte[] request = new byte[8];
        BinaryPrimitives.WriteUInt32LittleEndian(request, argsz);
        BinaryPrimitives.WriteUInt32LittleEndian(request.AsSpan(4), flags);
        return request;
    }

    private static ulong Size(VfioUserSide side)
    {
        byte[] bytes = new byte[8];
        Assert.That(side.Io.DeviceFeature(VfioDeviceFeature.MigDataSize, VfioFeatureOp.Get, bytes), Is.EqualTo(Errno.None));
        return BinaryPrimitives.ReadUInt64LittleEndian(bytes);
    }
}
