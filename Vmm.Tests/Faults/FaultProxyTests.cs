using System.Net;
using System.Net.Sockets;
using Vmm.Core.Interop;
using Vmm.Tests.Support;

namespace Vmm.Tests.Faults;

/// <summary>The proxy does what a plan says, at the byte that it says.</summary>
[TestFixture]
internal sealed class FaultProxyTests
{
    private const int Length = 200_000, DeadlineMs = 20_000, QuietMs = 150;

    private static readonly FaultAction[] s_actions =
        [FaultAction.None, FaultAction.Reset, FaultAction.Close, FaultAction.HalfClose, FaultAction.Stall, FaultAction.StallBoth, FaultAction.Lose, FaultAction.LoseBoth, FaultAction.Trickle];

    [Test]
    public void AFaultHappensAtItsByte([ValueSource(nameof(s_actions))] FaultAction action, [Values(0, 1, 70_001, Length - 1, Length)] int at, [Values] bool tcp)
    {
        using var rig = new Rig(tcp, new Fault { Role = Role.Main, Action = action, Offset = at, Target = Role.Main, Bytes = 50 });
        byte[] sent = new byte[Length];
        new Random(at).NextBytes(sent);
        Task sending = Task.Run(() => rig.Client.Send(sent));
        (byte[] got, string end) = Receive(rig.Server, Length);
        bool passes = action is FaultAction.None or FaultAction.Trickle;
        // Bytes that are on their way when a reset comes may be lost.
        if (action == FaultAction.Reset) Assert.That(got, Has.Length.LessThanOrEqualTo(at));
        else Assert.That(got, Has.Length.EqualTo(passes ? Length : at));
        Assert.That(got.AsSpan().SequenceEqual(sent.AsSpan(0, got.Length)));
        string[] expected = action switch
        {
            FaultAction.Reset => tcp ? ["reset"] : ["end", "reset"],
            FaultAction.Close => ["end"],
            FaultAction.HalfClose => ["end"],
            _ => ["quiet"],
        };
        Assert.That(expected, Does.Contain(end));
        if (action is not (FaultAction.Reset or FaultAction.Close))
        {
            rig.Server.Send([7]);
            Assert.That(Receive(rig.Client, 1).Bytes, Is.EqualTo(action is FaultAction.StallBoth or FaultAction.LoseBoth ? [] : (byte[])[7]), "the way back");
        }
        Assert.That(rig.Session.FiredAt != 0, Is.EqualTo(action != FaultAction.None));
        rig.Dispose();
        Assert.That(Task.WhenAny(sending).Wait(DeadlineMs), "the client's send ends with its connection");
    }

    [Test]
    public void AStallEndsAndNothingIsLost([Values] bool tcp)
    {
        using var rig = new Rig(tcp, new Fault { Role = Role.Main, Action = FaultAction.StallBoth, Offset = 1000, Ms = 300 });
        Task sending = Task.Run(() => rig.Client.Send(new byte[Length]));
        Assert.That(Receive(rig.Server, Length), Is.EqualTo((new byte[1000], "quiet")));
        Assert.That(rig.Server.Poll(DeadlineMs * 1000, SelectMode.SelectRead));
        Assert.That(Receive(rig.Server, Length - 1000).Bytes, Has.Length.EqualTo(Length - 1000));
        sending.Wait(DeadlineMs);
    }

    [Test]
    public void DescriptorsPassWithTheirBytes()
    {
        using var rig = new Rig(tcp: false, Fault.None);
        (OwnedFd read, OwnedFd write) = Posix.Pipe();
        using (read)
        {
            using var client = new OwnedFd((int)rig.Client.Handle, ownsFd: false);
            using var server = new OwnedFd((int)rig.Server.Handle, ownsFd: false);
            Posix.SendWithFds(client, "one"u8, [write], out _);
            Posix.SendWithFds(client, "two"u8, [], out _);
            write.Dispose();
            var fds = new List<OwnedFd>();
            byte[] text = new byte[16];
            int n = Posix.ReceiveWithFds(server, text, fds, wait: true, out _);
            Assert.That((text[..3], fds), Is.EqualTo(("one"u8.ToArray(), fds)));
            Assert.That(fds, Has.Count.EqualTo(1));
            Posix.Write(fds[0], "x"u8, out _);
            fds[0].Dispose();
            Assert.That((Posix.Read(read, text, out _), (char)text[0]), Is.EqualTo((1, 'x')));
            Assert.That(Posix.Read(read, text, out _), Is.Zero, "the proxy keeps no copy of the descriptor");
            if (n == 3) Posix.ReceiveWithFds(server, text, fds, wait: true, out _);
        }
    }

    [Test]
    public async Task TheMarksOfAStreamAreFoundInPiecesOfAnySize()
    {
        using TestVm vm = TestVm.WithRam(1 << 20).FilledRandom(1);
        var channel = new MemoryChannel();
        await vm.Engine.Migrate(channel);
        byte[] stream = channel.Written;
        int devices = stream.AsSpan().IndexOf("\u0005timer"u8) - 5;
        for (int piece = 1; piece <= 1 << 17; piece *= 3)
        {
            var marks = new StreamMarks();
            for (int at = 0; at < stream.Length; at += piece)
            {
                int from = Math.Max(0, at - StreamMarks.Overlap);
                marks.LookForward(stream.AsSpan(from, Math.Min(at + piece, stream.Length) - from), from);
            }
            Assert.That((marks.Devices, marks.End), Is.EqualTo(((long)devices, (long)stream.Length)), $"pieces of {piece}");
        }
        var back = new StreamMarks();
        foreach (byte one in (byte[])[0, 2, 0, 4, 0, 0, 0, 1, 0, 1, 0, 4, 0, 0, 0, 0]) back.LookBack([one]);
        Assert.That((back.Shut, back.ShutValue), Is.EqualTo((8L, 0)));
    }

    [Test]
    public void NothingIsLeftOfAProxy()
    {
        void Round()
        {
            foreach (FaultAction action in s_actions)
            {
                using var rig = new Rig(tcp: true, new Fault { Role = Role.Main, Action = action, Offset = 10, Bytes = 3 });
                rig.Client.Send(new byte[100]);
                Receive(rig.Server, 100);
            }
        }

        Round();
        List<string> before = LeakCheck.SettledDescriptors();
        Round();
        LeakCheck.NoMoreThan(before);
        LeakCheck.WaitFor(static () => !LeakCheck.ThreadNames().Exists(static t => t.Name.StartsWith("proxy/", StringComparison.Ordinal)), "a thread of the proxy is left");
    }

    /// <summary>Reads until so many bytes, the end, a reset, or silence.</summary>
    private static (byte[] Bytes, string End) Receive(Socket socket, int most)
    {
        var bytes = new MemoryStream();
        byte[] buffer = new byte[1 << 16];
        while (true)
        {
            // Behind the last byte an end may still follow.
            int wait = bytes.Length < most ? DeadlineMs : QuietMs;
            if (!socket.Poll((wait == DeadlineMs && bytes.Length == 0 ? QuietMs * 4 : QuietMs) * 1000, SelectMode.SelectRead)) return (bytes.ToArray(), "quiet");
            try
            {
                int n = socket.Receive(buffer);
                if (n == 0) return (bytes.ToArray(), "end");
                bytes.Write(buffer, 0, n);
                if (most == 1) return (bytes.ToArray(), "quiet");
            }
            catch (SocketException)
            {
                return (bytes.ToArray(), "reset");
            }
        }
    }

    /// <summary>A client and a server with a proxy between them.</summary>
    private sealed class Rig : IDisposable
    {
        private readonly TempDirectory _folder = new();
        private readonly Socket _listener;
        private readonly FaultProxy _proxy;
        private bool _disposed;

        internal Rig(bool tcp, Fault fault)
        {
            Session = new FaultSession(fault);
            _listener = New(tcp);
            _listener.Bind(tcp ? new IPEndPoint(IPAddress.Loopback, 0) : new UnixDomainSocketEndPoint(_folder["server"]));
            _listener.Listen(1);
            _proxy = new FaultProxy(tcp ? $"tcp:{_listener.LocalEndPoint}" : $"unix:{_folder["server"]}", tcp ? null : _folder["proxy"], () => Session, Role.Main);
            Client = New(tcp);
            Client.Connect(FaultProxy.EndPointOf(_proxy.Uri));
            Server = _listener.Accept();
        }

        internal FaultSession Session { get; }

        internal Socket Client { get; }

        internal Socket Server { get; }

        public void Dispose()
        {
            if (_disposed) return;
            _disposed = true;
            _proxy.Dispose();
            Session.Dispose();
            Client.Dispose();
            Server.Dispose();
            _listener.Dispose();
            _folder.Dispose();
        }

        private static Socket New(bool tcp) => tcp ? new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp)
            : new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
    }
}
