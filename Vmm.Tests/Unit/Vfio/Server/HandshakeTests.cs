using System.Text;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.RawVfioUserClient;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>Framing and version negotiation of the vfio-user server (vfio-user 1 and 2).</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
internal sealed class HandshakeTests : IDisposable
{
    private readonly ServedDevice _served = new(new FakeVfioUserBackend());

    public void Dispose() => _served.Dispose();

    private static string JsonOf(byte[] payload)
    {
        Assert.That(payload[^1], Is.Zero, "NUL");
        return Encoding.UTF8.GetString(payload[4..^1]);
    }

    [Test]
    public void S05_TheReplyIsNeverLongerThanTheRequest()
    {
        // The requests grow from the shortest with JSON to one whose reply has room for everything.
        for (int pad = 0; pad < 150; pad++)
        {
            string json = $$"""{"x":"{{new string('a', pad)}}","capabilities":{ } }""";
            using RawVfioUserClient client = _served.Connect();
            Assert.That(client.Negotiate(json), Has.Length.LessThanOrEqualTo(4 + json.Length + 1), json);
        }
        using RawVfioUserClient shortest = _served.Connect();
        Assert.That(JsonOf(shortest.Negotiate("{}")), Is.EqualTo("{}"));
    }

    [Test]
    public void S05_ARequestWithoutJsonGetsTheFullReply()
    {
        using RawVfioUserClient client = _served.Connect();
        // As libvfio-user, with every limit by name, also those that have their defaults.
        Assert.That(JsonOf(client.Negotiate(null)), Is.EqualTo(
            """{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,"pgsizes":4096,"max_dma_maps":65535,"migration":{"pgsize":4096},"write_multiple":true}}"""));
    }

    [Test]
    public void S06_TheMinorIsTheLesserOne([Values(0, 1, 2, 3, 65535)] int minor)
    {
        using RawVfioUserClient client = _served.Connect();
        Assert.That(BitConverter.ToUInt16(client.Negotiate(Json, (ushort)minor), 2), Is.EqualTo(Math.Min(minor, 2)));
    }

    [Test]
    public void S07_S08_TheReplyIsAnObjectWithOurLimitsAndNoTwinSocketUnasked()
    {
        using RawVfioUserClient client = _served.Connect();
        Assert.That(JsonOf(client.Negotiate()), Is.EqualTo("""{"capabilities":{"max_msg_fds":8,"migration":{"pgsize":4096},"write_multiple":true}}"""));
    }

    [Test]
    public void S07_ATwinSocketIsGivenWhenAskedFor()
    {
        using RawVfioUserClient client = _served.Connect();
        using VfioUserReply reply = client.Ask(VfioUserCommand.Version, Version("""{"capabilities":{"max_msg_fds":8,"twin_socket":{"supported":true},"padding":"0123456789012345678901234567890123456789"}}"""));
        Assert.That(JsonOf(reply.Payload), Does.Contain("\"twin_socket\":{\"supported\":true,\"fd_index\":0}"));
        Assert.That(reply.Fds, Has.Count.EqualTo(1));
        Assert.That(Posix.IsSocket(reply.Fds[0]));
    }

    private static IEnumerable<TestCaseData> BadVersions()
    {
        yield return new TestCaseData((object)Bytes((ushort)0)).SetArgDisplayNames("short");
        yield return new TestCaseData((object)Version("{}", 0, 1)).SetArgDisplayNames("major");
        yield return new TestCaseData((object)Bytes(0, Encoding.UTF8.GetBytes("{}"))).SetArgDisplayNames("no NUL");
        foreach (string json in (string[])["", "{", "[]", "1", """{"capabilities":1}""", """{"capabilities":[]}""", """{"capabilities":{"max_msg_fds":"x"}}""",
            """{"capabilities":{"max_msg_fds":-1}}""", """{"capabilities":{"max_msg_fds":1025}}""", """{"capabilities":{"migration":1}}""",
            """{"capabilities":{"migration":{"pgsize":"x"}}}""", """{"capabilities":{"twin_socket":true}}""", """{"capabilities":{"write_multiple":1}}"""])
            yield return new TestCaseData((object)Version(json)).SetArgDisplayNames($"'{json}'");
    }

    [TestCaseSource(nameof(BadVersions))]
    public void S09_ABadVersionIsInvalidAndEndsTheConnection(byte[] payload)
    {
        using RawVfioUserClient client = _served.Connect();
        client.Fails(Errno.EINVAL, VfioUserCommand.Version, payload);
        Assert.That(client.ReceiveOrEnd(), Is.Null);
        _served.Attach().Dispose();
    }

    [Test]
    public void S09_AnythingBeforeVersionIsInvalidAndEndsTheConnection()
    {
        using RawVfioUserClient client = _served.Connect();
        client.Invalid(VfioUserCommand.DeviceGetInfo, 16, 0, 0, 0);
        Assert.That(client.ReceiveOrEnd(), Is.Null);
    }

    [Test]
    public void S09_AVersionWithDescriptorsIsInvalid()
    {
        using OwnedFd fd = Posix.EventFd();
        using RawVfioUserClient client = _served.Connect();
        client.Fails(Errno.EINVAL, VfioUserCommand.Version, Version("{}"), fd);
        Assert.That(client.ReceiveOrEnd(), Is.Null);
    }

    [Test]
    public void ASecondVersionAndUnknownCommandsAreInvalidAndTheSessionGoesOn()
    {
        using RawVfioUserClient client = _served.Attach();
        client.Fails(Errno.EINVAL, VfioUserCommand.Version, Version("{}"));
        foreach (ushort command in (ushort[])[0, 11, 12, 19, 255, 65535]) client.Invalid((VfioUserCommand)command, 0, 0, 0, 0);
        foreach (ushort command in Enumerable.Range(0, 30).Where(static c => c != 13).Select(static c => (ushort)c)) client.Invalid((VfioUserCommand)command);
        client.Ok(VfioUserCommand.DeviceReset, []);
    }

    [Test]
    public void AReplyThatNobodyAskedForIsInvalidAndTheSessionGoesOn()
    {
        using RawVfioUserClient client = _served.Attach();
        client.Send(VfioUserCommand.DmaRead, new byte[32], flags: VfioUserHeader.Reply);
        using VfioUserReply reply = client.Receive();
        Assert.That(reply.Header.Errno, Is.EqualTo(Errno.EINVAL));
        client.Ok(VfioUserCommand.DeviceReset, []);
    }

    [Test]
    public void S04_ASizeThatCannotBeIsAnsweredOnceAndEndsTheConnection([Values(0u, 15u, (1u << 20) + 81, uint.MaxValue)] uint size)
    {
        using RawVfioUserClient client = _served.Attach();
        byte[] message = new byte[64];
        new VfioUserHeader(7, VfioUserCommand.DeviceReset, size, 0, Errno.None).Write(message);
        client.SendRaw(message);
        using VfioUserReply reply = client.Receive();
        Assert.That((reply.Header.Id, reply.Header.Errno), Is.EqualTo(((ushort)7, Errno.EINVAL)));
        Assert.That(EndsNow(client));
    }

    [Test]
    public void S01_S03_MessagesComeInAnyFragmentsAndStrayDescriptorsAreClosed()
    {
        // A unique name tells this test's descriptors from those of parallel tests.
        string name = $"stray-{Guid.NewGuid():n}";
        using (RawVfioUserClient client = _served.Attach())
        {
            using OwnedFd fd = Posix.MemFd(name, 4096);
            byte[] message = Bytes((ushort)9, (ushort)4, 32, 0, 0, 16, 0, 0, 0);
            for (int i = 0; i < 50; i++)
            {
                for (int at = 0; at < message.Length; at++)
                {
                    if (at % 3 == 0) client.SendRaw(message.AsSpan(at, 1), fd);
                    else client.SendRaw(message.AsSpan(at, 1));
                }
                using VfioUserReply reply = client.Receive();
                Assert.That(reply.Payload, Is.EqualTo(Bytes(16, 3, 9, 5)));
            }
        }
        _served.Ended();
        Assert.That(LeakCheck.Descriptors().Where(d => d.Contains(name, StringComparison.Ordinal)), Is.Empty);
    }

    [Test]
    public void S02_EveryReplyIsOneMessageAndIdsMayRepeat()
    {
        using RawVfioUserClient client = _served.Attach();
        for (int i = 0; i < 20; i++) client.Send(VfioUserCommand.DeviceGetInfo, Bytes(16, 0, 0, 0), id: 5);
        for (int i = 0; i < 20; i++)
        {
            using VfioUserReply reply = client.Receive();
            Assert.That(reply.Header, Is.EqualTo(new VfioUserHeader(5, VfioUserCommand.DeviceGetInfo, 32, 1, Errno.None)));
        }
    }

    private static bool EndsNow(RawVfioUserClient client)
    {
        try
        {
            return client.ReceiveOrEnd() is null;
        }
        catch (ChannelException e)
        {
            // The kernel reports ECONNRESET when the server closes the socket with unread bytes.
            return e.Errno == Errno.ECONNRESET;
        }
    }
}
