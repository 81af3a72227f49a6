using System.Text;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Tests.Unit.Vfio.User;

/// <summary>The client and the server read and write the VERSION payload (vfio-user 2).</summary>
[TestFixture]
public class VfioUserVersionTests
{
    private static byte[] Payload(string? json, ushort minor = 2, ushort major = 0, bool nul = true) =>
        [(byte)major, (byte)(major >> 8), (byte)minor, (byte)(minor >> 8), .. Encoding.UTF8.GetBytes(json ?? ""), .. json is not null && nul ? (byte[])[0] : []];

    [Test]
    public void TheReferenceReplyIsRead()
    {
        VfioUserVersion v = VfioUserVersion.Parse(Payload("{ \"capabilities\": { \"max_msg_fds\": 8, \"max_data_xfer_size\": 1048576, \"migration\": { \"pgsize\": 4096 } } }"));
        Assert.That((v.Major, v.Minor, v.MaxMsgFds, v.MaxDataXferBytes, v.Migration?.PageSizeBytes), Is.EqualTo((0, 2, 8, 1 << 20, 4096UL)));
        Assert.That(v.TwinSocket, Is.Null);
        Assert.That(v.WriteMultiple, Is.False);
    }

    [TestCase(null)]
    [TestCase("{}")]
    [TestCase("{\"capabilities\":{}}")]
    [TestCase("{\"x\":[1,{\"y\":null}],\"capabilities\":{\"later\":\"thing\"}}")]
    public void WhatIsAbsentHasItsDefault(string? json)
    {
        VfioUserVersion v = VfioUserVersion.Parse(Payload(json));
        Assert.That(v, Is.EqualTo(new VfioUserVersion { HasJson = json is not null }));
        Assert.That((v.MaxMsgFds, v.MaxDataXferBytes, v.PageSizes, v.MaxDmaMaps), Is.EqualTo((1, 1 << 20, 4096UL, 65535)));
    }

    [TestCase("")]
    [TestCase("[]")]
    [TestCase("{")]
    [TestCase("{}}")]
    [TestCase("{\"capabilities\":[]}")]
    [TestCase("{\"capabilities\":{\"max_msg_fds\":-1}}")]
    [TestCase("{\"capabilities\":{\"max_msg_fds\":1025}}")]
    [TestCase("{\"capabilities\":{\"max_msg_fds\":\"8\"}}")]
    [TestCase("{\"capabilities\":{\"max_msg_fds\":1.5}}")]
    [TestCase("{\"capabilities\":{\"max_data_xfer_size\":0}}")]
    [TestCase("{\"capabilities\":{\"max_data_xfer_size\":67108865}}")]
    [TestCase("{\"capabilities\":{\"pgsizes\":4097}}")]
    [TestCase("{\"capabilities\":{\"max_dma_maps\":65536}}")]
    [TestCase("{\"capabilities\":{\"migration\":true}}")]
    [TestCase("{\"capabilities\":{\"migration\":{\"pgsize\":100}}}")]
    [TestCase("{\"capabilities\":{\"migration\":{\"max_bitmap_size\":268435457}}}")]
    [TestCase("{\"capabilities\":{\"twin_socket\":{\"supported\":1}}}")]
    [TestCase("{\"capabilities\":{\"write_multiple\":\"true\"}}")]
    [TestCase("{\"capabilities\":{\"\\ud800\":1}}")]
    public void BadJsonIsRefused(string json) =>
        Assert.That(() => VfioUserVersion.Parse(Payload(json)), Throws.TypeOf<VfioUserProtocolException>());

    [Test]
    public void JsonWithoutNulAndShortPayloadsAreRefused()
    {
        Assert.That(() => VfioUserVersion.Parse(Payload("{}", nul: false)), Throws.TypeOf<VfioUserProtocolException>());
        Assert.That(() => VfioUserVersion.Parse(new byte[3]), Throws.TypeOf<VfioUserProtocolException>());
        Assert.That(() => VfioUserVersion.Parse(new byte[(64 << 10) + 1]), Throws.TypeOf<VfioUserProtocolException>());
    }

    [Test]
    public void PayloadsRoundTrip()
    {
        var v = new VfioUserVersion
        {
            Minor = 1, MaxMsgFds = 16, MaxDataXferBytes = 4096, PageSizes = 0x201000, MaxDmaMaps = 100, WriteMultiple = true,
            Migration = new VfioUserMigrationCapability(4096, 1 << 20), TwinSocket = new VfioUserTwinSocket(true, 0),
        };
        Assert.That(VfioUserVersion.Parse(v.ToPayload()), Is.EqualTo(v));
    }

    [Test]
    public void TheReplyIsCompact()
    {
        var server = new VfioUserVersion { MaxMsgFds = 8, Migration = new VfioUserMigrationCapability(4096) };
        byte[] reply = server.ToReply(new VfioUserVersion(), 1000);
        Assert.That(Encoding.UTF8.GetString(reply[4..^1]), Is.EqualTo("{\"capabilities\":{\"max_msg_fds\":8,\"migration\":{\"pgsize\":4096}}}"));
        Assert.That(reply, Has.Length.EqualTo(83 - 16));
    }

    [Test]
    public void TheReplyIsNeverLongerThanTheRequestAndItsMinorNeverGreater([Values("{}", "{\"capabilities\":{}}", "{\"capabilities\":{\"max_msg_fds\":32}}", "{\"capabilities\":{\"max_msg_fds\":32,\"x\":1234567890123}}")] string json)
    {
        byte[] request = Payload(json, minor: 0);
        var server = new VfioUserVersion { MaxMsgFds = 8, WriteMultiple = true, Migration = new VfioUserMigrationCapability(4096, 1 << 20), TwinSocket = new VfioUserTwinSocket(true, 0) };
        byte[] reply = server.ToReply(VfioUserVersion.Parse(request), request.Length);
        Assert.That(reply, Has.Length.LessThanOrEqualTo(request.Length));
        VfioUserVersion parsed = VfioUserVersion.Parse(reply);
        Assert.That(parsed.Minor, Is.Zero);
        Assert.That(parsed.TwinSocket, Is.Null, "the client did not ask for a twin socket");
    }

    [Test]
    public void ARestrictionIsNeverLeftOut() =>
        Assert.That(() => new VfioUserVersion { MaxDataXferBytes = 100 }.ToReply(new VfioUserVersion(), 7), Throws.TypeOf<VfioUserProtocolException>());

    [Test]
    public void ARequestWithoutJsonGetsAllOfIt() =>
        Assert.That(VfioUserVersion.Parse(new VfioUserVersion { MaxMsgFds = 8 }.ToReply(VfioUserVersion.Parse(Payload(null)), 4)).MaxMsgFds, Is.EqualTo(8));
}
