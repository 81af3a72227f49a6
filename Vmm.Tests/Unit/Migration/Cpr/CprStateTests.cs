using Vmm.Core.Cpr;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Migration.Cpr;

namespace Vmm.Tests.Unit.Migration.Cpr;

/// <summary>The bytes of the CPR state (vfio-migration 7.2).</summary>
[TestFixture]
public class CprStateTests
{
    /// <summary>The state that QEMU 11.1.3 sent for <c>-M none,memory-backend=m</c>; the byte 0x20 carried the memfd.</summary>
    private const string Qemu111 = "514350520000000101000000026d000000000020" + "00051543707253746174652f7666696f20646576696365730000000100";

    /// <summary>The layout that vfio-migration 7.2 shows for cpr-exec with an IOMMUFD device.</summary>
    private static readonly byte[] s_exec =
    [
        .. "QCPR"u8, 0, 0, 0, 1, 1, 0, 0, 0, 9, .. "iommufd0\0"u8, 0, 0, 0, 0, 0, 0, 0, 0x13, 0, 5, 0x15, .. "CprState/vfio devices"u8, 0, 0, 0, 1,
        1, 0, 0, 0, 0x0d, .. "0000:00:01.0\0"u8, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0,
    ];

    [Test]
    public void WhatQemu111SentIsWhatIsWritten()
    {
        using OwnedFd fd = Posix.EventFd();
        IReadOnlyList<CprState.Part> parts = CprState.ToParts([new CprFd("m", 0, fd)], []);
        Assert.That(Convert.ToHexStringLower([.. parts.SelectMany(static p => p.Bytes)]), Is.EqualTo(Qemu111));
        Assert.That(parts.Where(static p => p.Fd is not null).Select(static p => p.Bytes), Is.EqualTo(new byte[][] { [CprState.FdMark] }), "each descriptor travels with one byte of its own");
    }

    [Test]
    public void WhatQemu111SentIsRead()
    {
        OwnedFd fd = Posix.EventFd();
        using CprIncoming read = CprState.Parse(Convert.FromHexString(Qemu111), MigrationMode.CprTransfer, _ => fd);
        Assert.That(read.Fds, Is.EqualTo(new[] { new CprFd("m", 0, fd) }));
        Assert.That(read.Devices, Is.Empty);
    }

    [Test]
    public void NumbersAndIommufdDevicesOfAnExecAreReadAndWrittenBack()
    {
        using var fd = new OwnedFd(0x13, ownsFd: false);
        using CprIncoming read = CprState.Parse(s_exec, MigrationMode.CprExec, n => n == 0x13 ? fd : null);
        Assert.That(read.Devices, Is.EqualTo(new[] { new CprIommufdDevice("0000:00:01.0", 1, 2, 3) }));
        Assert.That(CprState.ToBytes(read.Fds, read.Devices), Is.EqualTo(s_exec));
    }

    [Test]
    public void AStateBeforeTheDeviceListIsRead() =>
        Assert.That(CprState.Parse([.. s_exec.AsSpan(0, 8), 0], MigrationMode.CprExec, static _ => null).Fds, Is.Empty);

    [Test]
    public void EveryPrefixFails()
    {
        using var fd = new OwnedFd(0x13, ownsFd: false);
        int complete = s_exec.AsSpan().IndexOf("\0\0\0\x13"u8) + 5;
        for (int n = 0; n < s_exec.Length; n++)
        {
            if (n == complete) continue; // QEMU 10.0 writes exactly this, without the subsection.
            Assert.That(() => CprState.Parse(s_exec.AsSpan(0, n).ToArray(), MigrationMode.CprExec, _ => fd), Throws.InstanceOf<StreamTruncatedException>().Or.InstanceOf<StreamFormatException>(), $"{n} bytes");
        }
    }

    [TestCase(0, "magic")]
    [TestCase(7, "version")]
    [TestCase(8, "mark in the descriptor list")]
    [TestCase(9, "name length")]
    [TestCase(21, "NUL at its end")]
    public void EachFieldIsChecked(int offset, string expected)
    {
        byte[] bytes = [.. s_exec];
        bytes[offset] ^= 0x55;
        Assert.That(() => CprState.Parse(bytes, MigrationMode.CprExec, static _ => null), Throws.InstanceOf<VmmException>().With.Message.Contains(expected));
    }

    [Test]
    public void ADescriptorThatDidNotComeIsNamedAndTheOthersAreClosed()
    {
        OwnedFd first = Posix.EventFd(), second = Posix.EventFd();
        byte[] bytes = [.. CprState.ToParts([new CprFd("a", 1, first), new CprFd("b", 2, second)], []).SelectMany(static p => p.Bytes)];
        second.Dispose();
        var came = new Queue<OwnedFd>([first]);
        Assert.That(() => CprState.Parse(bytes, MigrationMode.CprTransfer, _ => came.TryDequeue(out OwnedFd? fd) ? fd : null),
            Throws.TypeOf<StreamFormatException>().With.Message.Contains("descriptor 'b' 2"));
        Assert.That(first.IsClosed);
    }

    [Test]
    public void OfTwoDescriptorsWithOneKeyTheFirstCounts()
    {
        OwnedFd first = Posix.EventFd(), second = Posix.EventFd();
        using var table = new CprFdTable();
        table.Receive(new CprIncoming(MigrationMode.CprTransfer, [new CprFd("a", 0, first), new CprFd("a", 0, second)], []));
        Assert.That(second.IsClosed);
        using OwnedFd? taken = table.Take("a", 0);
        Assert.That(taken, Is.SameAs(first));
        Assert.That(table.Take("a", 0), Is.Null, "a descriptor is given away once");
    }

    [Test]
    public void WhatNobodyTakesIsClosed()
    {
        OwnedFd fd = Posix.EventFd();
        using var table = new CprFdTable();
        table.Receive(new CprIncoming(MigrationMode.CprTransfer, [new CprFd("a", 3, fd)], []));
        Assert.That(table.CloseUnclaimed(), Is.EqualTo(new[] { "'a' 3" }));
        Assert.That(fd.IsClosed);
    }
}
