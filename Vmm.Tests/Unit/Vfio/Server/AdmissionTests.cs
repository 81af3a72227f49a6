using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.User.Client;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.RawVfioUserClient;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>Who gets a served device: the first client with a VERSION. All others are told at once, and a connection that says nothing costs nobody anything.</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
internal sealed class AdmissionTests : IDisposable
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(20);
    private readonly TempDirectory _folder = new();
    private readonly FakeVfioUserBackend _fake = new();
    private VfioUserServer? _server;

    private string Socket => _folder["device"];

    public void Dispose()
    {
        _server?.Dispose();
        _fake.Dispose();
        _folder.Dispose();
    }

    private VfioUserServer Listen(VfioUserServerOptions? options = null)
    {
        _server = new VfioUserServer(_fake, options);
        _server.Listen(Socket);
        return _server;
    }

    private RawVfioUserClient Dial()
    {
        OwnedFd socket = Posix.Socket(Posix.AF_UNIX);
        Assert.That(Posix.Connect(socket, Posix.UnixAddress(Socket), null, 5000), Is.EqualTo(Errno.None));
        return new RawVfioUserClient(socket);
    }

    public enum Stray
    {
        Silent,
        PartOfAHeader,
        HeaderWithoutBody,
        Abandoned,
    }

    private RawVfioUserClient Disturb(Stray how)
    {
        RawVfioUserClient client = Dial();
        byte[] version = Bytes((ushort)1, (ushort)1, 16 + Version(Json).Length, 0, 0);
        if (how == Stray.PartOfAHeader) client.SendRaw(version.AsSpan(0, 15));
        if (how == Stray.HeaderWithoutBody) client.SendRaw(version);
        if (how == Stray.Abandoned) client.HangUp();
        return client;
    }

    [Test]
    public void ConnectionsWithoutAVersionKeepNobodyFromTheDevice([Values] Stray how, [Values(1, 3, 40)] int many)
    {
        Listen();
        RawVfioUserClient[] strays = [.. Enumerable.Range(0, many).Select(_ => Disturb(how))];
        var clock = Stopwatch.StartNew();
        using (RawVfioUserClient client = Dial())
        {
            client.Negotiate();
            Assert.That(clock.Elapsed, Is.LessThan(VfioUserDeadlines.Greeting), "the device is served before the strays' deadline");
            client.RegionWrite(0, 0, 42);
            Assert.That(client.Read32(0, 0), Is.EqualTo(42));
        }
        foreach (RawVfioUserClient one in strays) one.Dispose();
    }

    [Test]
    public void AConnectionThatStaysWithoutAVersionEnds([Values(Stray.Silent, Stray.PartOfAHeader, Stray.HeaderWithoutBody)] Stray how)
    {
        Listen(new VfioUserServerOptions { GreetingTimeout = TimeSpan.FromMilliseconds(200) });
        using RawVfioUserClient stray = Disturb(how);
        Assert.That(stray.ReceiveOrEnd(), Is.Null, "the server closes it");
    }

    [Test]
    public void OnlyAFewConnectionsWithoutAVersionAreKept()
    {
        Listen();
        RawVfioUserClient[] strays = [.. Enumerable.Range(0, VfioUserLimits.Greetings + 4).Select(_ => Dial())];
        foreach (RawVfioUserClient oldest in strays.Take(4)) Assert.That(oldest.ReceiveOrEnd(), Is.Null, "a newer connection takes its place");
        strays[^1].Negotiate();
        foreach (RawVfioUserClient one in strays) one.Dispose();
    }

    [Test]
    public void TheNextClientIsToldThatTheDeviceIsInUse()
    {
        VfioUserServer server = Listen();
        using RawVfioUserClient first = Dial();
        first.Negotiate();
        first.RegionWrite(0, 0, 42);
        for (int i = 0; i < 3; i++)
        {
            using RawVfioUserClient next = Dial();
            next.Fails(Errno.EBUSY, VfioUserCommand.Version, Version(Json));
            Assert.That(next.ReceiveOrEnd(), Is.Null);
        }
        Assert.That(first.Read32(0, 0), Is.EqualTo(42), "the client that has the device notices nothing");
        Assert.That(server.Stats.Sessions, Is.EqualTo(1));
        first.HangUp();
        using RawVfioUserClient after = Dial();
        after.Negotiate();
        Assert.That(after.Read32(0, 0), Is.EqualTo(42));
    }

    [Test]
    public void OurClientSaysThatTheServerIsBusy()
    {
        Listen();
        using RawVfioUserClient first = Dial();
        first.Negotiate();
        Assert.That(Assert.Throws<ChannelException>(() => VfioUserClient.Connect(Socket, new VfioUserContainer("test"), 5000))!,
            Has.Property(nameof(VmmException.Errno)).EqualTo(Errno.EBUSY).And.Message.Contains("busy with another client"));
    }

    [Test]
    public void TheNextClientWaitsWhileTheDeviceIsTakenBackFromTheLast()
    {
        Listen();
        var quiet = new TaskCompletionSource<Errno>(TaskCreationOptions.RunContinuationsAsynchronously);
        using RawVfioUserClient first = Dial();
        first.Negotiate();
        _fake.OnQuiesce = () => new ValueTask<Errno>(quiet.Task);
        first.HangUp();
        using RawVfioUserClient next = Dial();
        ushort id = next.Send(VfioUserCommand.Version, Version(Json));
        LeakCheck.WaitFor(() => _fake.Log.Count == 0, "the last client's session has not begun to end");
        Assert.That(next.HasNothingToRead);
        quiet.SetResult(Errno.None);
        using VfioUserReply reply = next.Receive();
        Assert.That((reply.Header.Id, reply.Header.Errno), Is.EqualTo((id, Errno.None)));
    }

    [Test]
    public void AClientThatStopsInTheMiddleOfAMessageLosesTheDevice([Values(15, 16, 20)] int bytes)
    {
        Listen(new VfioUserServerOptions { StallTimeout = TimeSpan.FromMilliseconds(200) });
        using RawVfioUserClient stuck = Dial();
        stuck.Negotiate();
        byte[] message = Bytes((ushort)9, (ushort)4, 32, 0, 0, 16, 0, 0, 0);
        stuck.SendRaw(message.AsSpan(0, bytes));
        Assert.That(stuck.ReceiveOrEnd(), Is.Null, "the server closes the connection");
        using RawVfioUserClient next = Dial();
        next.Negotiate();
    }

    [Test]
    public void AClientThatTakesNoRepliesLosesTheDevice()
    {
        Listen(new VfioUserServerOptions { StallTimeout = TimeSpan.FromMilliseconds(200) });
        using RawVfioUserClient stuck = Dial();
        stuck.Negotiate();
        byte[] request = Bytes((ushort)9, (ushort)9, 32, 0, 0, 0UL, FakeVfioUserBackend.Whole, 0x4000);
        Task sending = Task.Run(() =>
        {
            // Until the server closes the connection, because its replies are not taken.
            while (true) stuck.SendRaw(request);
        });
        Assert.That(() => sending.Wait(s_deadline), Throws.InnerException.TypeOf<ChannelException>());
        using RawVfioUserClient next = Dial();
        next.Negotiate();
    }

    [Test]
    public void AnIdleClientKeepsTheDevice()
    {
        Listen(new VfioUserServerOptions { StallTimeout = TimeSpan.FromMilliseconds(50), GreetingTimeout = TimeSpan.FromMilliseconds(100) });
        using RawVfioUserClient idle = Dial();
        idle.Negotiate();
        // A stray that came later has met its deadline, so the idle client's would have passed too.
        using RawVfioUserClient stray = Dial();
        Assert.That(stray.ReceiveOrEnd(), Is.Null);
        idle.RegionWrite(0, 0, 7);
        Assert.That(idle.Read32(0, 0), Is.EqualTo(7));
    }

    [Test]
    public void AServerThatEndsLateLeavesItsSuccessorsSocketAlone()
    {
        VfioUserServer late = Listen();
        var quiet = new TaskCompletionSource<Errno>(TaskCreationOptions.RunContinuationsAsynchronously);
        using RawVfioUserClient client = Dial();
        client.Negotiate();
        _fake.OnQuiesce = () => new ValueTask<Errno>(quiet.Task);
        late.Stop();
        LeakCheck.WaitFor(() => !Path.Exists(Socket), "the path is not free, although the server accepts nobody any more");
        using var other = new FakeVfioUserBackend();
        using var successor = new VfioUserServer(other);
        successor.Listen(Socket);
        Assert.That(late.Completed.IsCompleted, Is.False, "the last session still ends");
        quiet.SetResult(Errno.None);
        Assert.That(late.Completed.Wait(s_deadline));
        using RawVfioUserClient next = Dial();
        next.Negotiate();
    }
}
