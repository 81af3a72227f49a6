using System.Reflection;
using System.Text;
using Vmm.Core.Channels;
using Vmm.Core.Cpr;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.Multifd;
using Vmm.Migration.Qmp;
using Vmm.Migration.Ram;
using Vmm.Migration.Snapshot;
using Vmm.Migration.Status;
using Vmm.Migration.Stream;
using Vmm.Migration.Update;
using Vmm.Migration.Viewer;
using Vmm.Tests.Support;
using Vmm.Tests.Unit.Core.VmStates;
using Vmm.Tests.Unit.Migration.Viewer;

namespace Vmm.Tests.Unit.Migration;

/// <summary>A peer that goes over a limit gets an error that names the limit. The table has every limit of <see cref="WireLimits"/>.</summary>
[TestFixture]
public sealed class WireLimitsTests
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);

    /// <summary>For each limit, an action that goes over it by one and returns the error's text.</summary>
    private static readonly Dictionary<string, Func<string>> s_over = new()
    {
        [nameof(WireLimits.MachineNameBytes)] = static () => Load(new StreamBuilder().U32(StreamConstants.Magic).U32(3).U8(7).U32(WireLimits.MachineNameBytes + 1)),
        [nameof(WireLimits.Capabilities)] = static () =>
            Load(new StreamBuilder().Header().U8(5).Counted("configuration/capabilities").U32(1).U32(WireLimits.Capabilities + 1)),
        [nameof(WireLimits.VmDescBytes)] = static () => Load(new StreamBuilder().Header().Eof().U8(6).U32(WireLimits.VmDescBytes + 1)),
        [nameof(WireLimits.PackagedBytes)] = static () => Load(new StreamBuilder().Header().U8(8).U16(7).U16(4).U32(WireLimits.PackagedBytes + 1)),
        [nameof(WireLimits.SectionIds)] = static () =>
        {
            StreamBuilder stream = new StreamBuilder().Header();
            for (uint id = 0; id <= WireLimits.SectionIds; id++) stream.Full(id, "timer", 2, new byte[24]);
            return Load(stream);
        },
        [nameof(WireLimits.RamBlocks)] = static () =>
        {
            var bytes = new StreamBuilder();
            for (int i = 0; i <= WireLimits.RamBlocks; i++) bytes.Counted("m").U64(4096);
            var list = new RamBlockListReader(Reader(bytes), (WireLimits.RamBlocks + 1) * 4096, new RamBlockLayout());
            return Failure(() => { while (list.TryRead(out _)) { } });
        },
        [nameof(WireLimits.XbzrleBytes)] = static () => Failure(() => RamRecord.ReadXbzrle(Reader(new StreamBuilder().U8(1).U16(WireLimits.XbzrleBytes + 1)), new byte[WireLimits.XbzrleBytes])),
        [nameof(WireLimits.ReturnPathPayloadBytes)] = static () =>
        {
            (InMemoryChannel source, InMemoryChannel destination) = InMemoryChannel.CreatePair(4096);
            using (source)
            using (destination)
            {
                var path = new ReturnPathReader(source, new FaultLatch());
                path.Start();
                destination.Write(new StreamBuilder().U16(2).U16(WireLimits.ReturnPathPayloadBytes + 1).ToArray());
                Assert.That(path.WaitEnd(s_deadline), Is.Not.EqualTo(ReturnPathEnd.Open).And.Not.EqualTo(ReturnPathEnd.Confirmed));
                return path.Failure!.Message;
            }
        },
        [nameof(WireLimits.MultifdStateBytes)] = static () =>
        {
            StreamBuilder bytes = new StreamBuilder().Bytes(MultifdPacket.Preamble(Guid.Empty, 0));
            bytes.Bytes(MultifdBytes.State("d/vfio", 0, WireLimits.MultifdStateBytes + 1));
            using TestVm vm = TestVm.WithRam(1 << 20, incoming: true);
            return Multifd(vm, bytes.ToArray());
        },
        [nameof(WireLimits.MultifdCompressedBytes)] = static () =>
        {
            using TestVm vm = TestVm.WithRam(1 << 20, incoming: true);
            StreamBuilder bytes = new StreamBuilder().Bytes(MultifdPacket.Preamble(Guid.Empty, 0));
            bytes.Bytes(MultifdBytes.Compressed(vm.Ram, [0], 0, MultifdFlags.Zlib, WireLimits.MultifdCompressedBytes + 1));
            return Multifd(vm, bytes.ToArray(), new MultifdSettings(1, MultifdCompression.Zlib));
        },
        [nameof(WireLimits.ManifestBytes)] = static () =>
        {
            using var folder = new TempDirectory();
            File.WriteAllBytes(folder[ManifestFile.Name], new byte[WireLimits.ManifestBytes + 1]);
            return Failure(() => ManifestFile.Read(folder.Path));
        },
        [nameof(WireLimits.QmpRequestBytes)] = static () => Qmp([(byte)'"', .. Enumerable.Repeat((byte)'a', WireLimits.QmpRequestBytes)]),
        [nameof(WireLimits.QmpTokens)] = static () => Qmp([(byte)'[', .. Enumerable.Range(0, WireLimits.QmpTokens).Select(static i => i % 2 == 0 ? (byte)'1' : (byte)','), (byte)'1']),
        [nameof(WireLimits.QmpNesting)] = static () => Qmp([.. Enumerable.Repeat((byte)'[', WireLimits.QmpNesting + 1)]),
        [nameof(WireLimits.QmpFds)] = static () =>
        {
            using var host = new QmpHost();
            using QmpWire wire = host.Client();
            using OwnedFd fd = Posix.EventFd();
            for (int i = 0; i < WireLimits.QmpFds; i++)
            {
                wire.Return("getfd", $"{{\"fdname\":\"f{i}\"}}", fd);
                wire.Return("add-fd", "{\"fdset-id\":1}", fd);
            }
            Assert.That(wire.Error("add-fd", "{\"fdset-id\":2}", fd), Does.Contain("WireLimits.QmpFds"));
            Assert.That(wire.Execute("getfd", "{\"fdname\":\"f0\"}", fd).ContainsKey("return"), "a name that is there can be given again");
            return wire.Error("getfd", "{\"fdname\":\"more\"}", fd);
        },
        [nameof(WireLimits.UpdateReportBytes)] = static () =>
        {
            using var folder = new TempDirectory();
            using var reports = new UpdateReports(folder["report"]);
            UpdateReports.SendTried(folder["report"], new string('x', 2 * WireLimits.UpdateReportBytes));
            Assert.That(reports.Tried.Wait(s_deadline));
            Assert.That($"tried {reports.Tried.Result}".Length, Is.EqualTo(WireLimits.UpdateReportBytes), "the rest is not read");
            return "WireLimits.UpdateReportBytes";
        },
        [nameof(WireLimits.CprFds)] = static () =>
        {
            StreamBuilder bytes = Cpr();
            for (uint i = 0; i <= WireLimits.CprFds; i++) bytes.U8(1).U32(2).Bytes([(byte)'n', 0]).U32(i).U32(0);
            return Failure(() => CprState.Parse(bytes.U8(0).ToArray(), MigrationMode.CprExec, static _ => new OwnedFd(0, ownsFd: false)));
        },
        [nameof(WireLimits.CprNameBytes)] = static () => Failure(() => CprState.Parse(Cpr().U8(1).U32(WireLimits.CprNameBytes + 1).ToArray(), MigrationMode.CprExec, static _ => null)),
        [nameof(WireLimits.CprStateBytes)] = static () => Failure(() => CprState.ToBytes(
            [], [.. Enumerable.Range(0, 1 + (WireLimits.CprStateBytes / 1000)).Select(static i => new CprIommufdDevice(new string('x', 1000), i, 0, 0))])),
        [nameof(WireLimits.ViewerVmDescBytes)] = static () => View(
            new StreamBuilder().Header().Eof().U8(6).U32(WireLimits.ViewerVmDescBytes + 1).Bytes(new byte[WireLimits.ViewerVmDescBytes + 1])),
        [nameof(WireLimits.ViewerPages)] = static () =>
        {
            StreamBuilder stream = new StreamBuilder().Header().RamStart().RamPart(static b =>
            {
                b.U64(0x2).Counted("m").U8(0);
                for (int i = 0; i <= WireLimits.ViewerPages; i++) b.U64(0x22).U8(0);
            });
            return View(stream.RamPart(static _ => { }, type: 3).Eof());
        },
        [nameof(WireLimits.ViewerFindings)] = static () =>
        {
            StreamBuilder stream = new StreamBuilder().Header();
            for (int i = 0; i < 2 * WireLimits.ViewerFindings; i++) stream.Command(99);
            Assert.That(StreamViewer.Read(new MemoryFile(stream.Eof().ToArray())).Findings, Has.Count.EqualTo(WireLimits.ViewerFindings));
            return "WireLimits.ViewerFindings";
        },
    };

    /// <summary>Limits that another test goes over.</summary>
    private static readonly Dictionary<string, MethodInfo?> s_elsewhere = new()
    {
        [nameof(WireLimits.VmStateDepth)] = typeof(VmStateSubsectionTests).GetMethod(nameof(VmStateSubsectionTests.NestedSubsectionsAreBoundInDepthByTheirDeclaration)),
        [nameof(WireLimits.ZstdWindowLog)] = typeof(PageCompressionTests).GetMethod(nameof(PageCompressionTests.AFrameWithALargerWindowIsRefused)),
        [nameof(WireLimits.VmStateElements)] = typeof(VmStateFieldTests).GetMethod(nameof(VmStateFieldTests.ACountIsBoundedByTheTargetBeforeAnythingIsAllocated)),
        [nameof(WireLimits.ViewerFields)] = typeof(StreamViewerTests).GetMethod(nameof(StreamViewerTests.WhatIsTooMuchIsLeftOutNotHeld)),
        [nameof(WireLimits.ViewerEntries)] = typeof(StreamViewerTests).GetMethod(nameof(StreamViewerTests.WhatIsTooMuchIsLeftOutNotHeld)),
    };

    private static IEnumerable<string> Limits() => typeof(WireLimits).GetFields().Select(static f => f.Name);

    [TestCaseSource(nameof(Limits))]
    public void WhoGoesOverALimitIsToldWhichOne(string limit)
    {
        if (s_elsewhere.TryGetValue(limit, out MethodInfo? test))
        {
            Assert.That(test, Is.Not.Null, "the test is there");
            return;
        }
        Assert.That(s_over, Contains.Key(limit), "nobody goes over this limit");
        string value = Convert.ToString(typeof(WireLimits).GetField(limit)!.GetRawConstantValue(), System.Globalization.CultureInfo.InvariantCulture)!;
        Assert.That(s_over[limit](), Does.Contain($"WireLimits.{limit}").Or.Contain($"to {value}").Or.Contain("limit exceeded"));
    }

    [Test]
    public void TheTableHasNoLimitThatIsGone() => Assert.That(s_over.Keys.Concat(s_elsewhere.Keys), Is.SubsetOf(Limits()).And.Unique);

    private static string Load(StreamBuilder stream)
    {
        using TestVm vm = TestVm.WithRam(1 << 20, incoming: true);
        Assert.That(vm.Engine.MigrateIncoming(new MemoryChannel(stream.ToArray())).WaitAsync(s_deadline).Result, Is.EqualTo(MigrationStatus.Failed));
        return vm.Engine.Query().Error!.Message;
    }

    private static string Failure(Action read) => Assert.Catch<VmmException>(() => read())!.Message;

    private static QemuFileReader Reader(StreamBuilder bytes) => new(new MemoryChannel(bytes.ToArray()));

    private static StreamBuilder Cpr() => new StreamBuilder().U32(CprState.Magic).U32(CprState.Version);

    private static string Qmp(byte[] bytes)
    {
        var reader = new QmpJsonReader();
        reader.Feed(bytes);
        Assert.That(reader.TryTake(out QmpInput input));
        return input.Error ?? "no error";
    }

    private static string View(StreamBuilder stream) =>
        string.Join('\n', StreamViewer.Read(new MemoryFile(stream.ToArray()), new StreamViewOptions { ListPages = true }).Findings.Select(static f => f.Message));

    private static string Multifd(TestVm vm, byte[] bytes, MultifdSettings? settings = null)
    {
        var latch = new FaultLatch();
        (InMemoryChannel from, InMemoryChannel to) = InMemoryChannel.CreatePair(bytes.Length + 1);
        using (from)
        {
            var stream = new LoadStream(vm.Vm.SaveVm, new QemuFileReader(new MemoryChannel([])), new LoadContext { HasDataChannels = true });
            stream.LoadSetup();
            using var receiver = new MultifdReceiver([to], settings ?? MultifdBytes.One, Guid.Empty, latch);
            from.Write(bytes);
            from.Shutdown(ChannelShutdown.Write);
            receiver.Start(stream);
            Assert.That(Assert.Catch(() => { while (true) receiver.WaitSync(); }), Is.Not.Null);
            return latch.Reason!.Message;
        }
    }
}
