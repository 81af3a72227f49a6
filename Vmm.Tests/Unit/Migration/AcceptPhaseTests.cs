using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Logging;
using Vmm.Core.Devices;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Migration;
using Vmm.Migration.Channels;
using Vmm.Migration.Multifd;
using Vmm.Migration.Status;
using Vmm.Migration.Stream;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration;

/// <summary>A destination that waits: connections that are no migration cost it nothing, however many, and never the one attempt that it has.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class AcceptPhaseTests
{
    private const ulong Size = 4 << 20;

    /// <summary>Far below the 5 s and 10 s that a stray connection cost once.</summary>
    private static readonly TimeSpan s_atOnce = TimeSpan.FromSeconds(4);

    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(60);

    /// <summary>What strays do, each with the bytes that it sends and how it ends.</summary>
    public enum Stray
    {
        /// <summary>Connects and says nothing.</summary>
        Silent,
        /// <summary>Connects and closes, as a port probe does.</summary>
        Close,
        /// <summary>Connects and resets.</summary>
        Reset,
        /// <summary>Sends a request of another protocol and waits for the answer.</summary>
        Garbage,
        /// <summary>Sends garbage that begins as a stream does, and waits.</summary>
        AlmostHeader,
        /// <summary>Sends the first bytes of a header and waits.</summary>
        HalfHeader,
        /// <summary>Sends the first bytes of a header and closes.</summary>
        HalfHeaderClose,
        /// <summary>Sends a header and closes: a source that was stopped while it connected.</summary>
        HeaderClose,
        /// <summary>Sends half a preamble of multifd and closes.</summary>
        HalfPreambleClose,
        /// <summary>Sends a preamble of multifd and closes.</summary>
        PreambleClose,
    }

    [Test]
    public async Task StrayConnectionsCostNothing([Values] Stray stray, [Values] bool multifd, [Values] bool keepListening, [Values(1, 20)] int count, [Values] bool unix)
    {
        using var folder = new TempDirectory();
        using TestVm source = TestVm.WithRam(Size).FilledRandom(1), destination = TestVm.WithRam(Size, incoming: true);
        source.Vm.Cont();
        destination.Engine.SetCapabilities([new(MigrationCapability.Multifd, multifd)]);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse(unix ? $"unix:{folder["s"]}" : "tcp:127.0.0.1:0"), keepListening);
        MigrationAddress to = destination.Engine.Query().SocketAddresses[0];
        List<Socket> strays = [.. Enumerable.Range(0, count).Select(_ => Connect(to))];
        try
        {
            foreach (Socket one in strays) Play(one, stray);
            await Migrate(source, to, multifd).WaitAsync(s_atOnce);
            Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{destination.Engine.Query().Error}");
            RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
        }
        finally
        {
            strays.ForEach(static s => s.Dispose());
        }
    }

    [Test]
    public void StraysLeaveTheStatusAndTheVmAlone([Values] bool multifd)
    {
        using TestVm destination = TestVm.WithRam(Size, incoming: true);
        var changes = new List<MigrationStatus>();
        destination.Engine.StatusChanged += changes.Add;
        (Task<MigrationStatus> incoming, int port) = Listen(destination, multifd, keepListening: false);
        foreach (Stray stray in Enum.GetValues<Stray>())
        {
            using Socket one = Connect(port);
            Play(one, stray);
        }
        // Garbage is answered by a close, so the last one shows that all have been looked at.
        using Socket last = Connect(port);
        Play(last, Stray.Garbage);
        WaitClosed(last);
        Assert.That(incoming.IsCompleted, Is.False);
        Assert.That(changes, Is.EqualTo(new[] { MigrationStatus.Setup }));
        Assert.That(destination.Vm.RunState.State, Is.EqualTo(RunState.InMigrate));
        Assert.That(destination.Engine.Query().Error, Is.Null);
    }

    [Test]
    public async Task HundredsAtOnceAreBoundedAndTheOldestGo([Values] bool multifd)
    {
        const int many = 600;
        using TestVm source = TestVm.WithRam(Size).FilledRandom(2), destination = TestVm.WithRam(Size, incoming: true);
        source.Vm.Cont();
        (Task<MigrationStatus> incoming, int port) = Listen(destination, multifd, keepListening: false);
        List<Socket> strays = [.. Enumerable.Range(0, many).Select(_ => Connect(port))];
        try
        {
            LeakCheck.WaitFor(() => strays.Count(IsClosed) >= many - ConnectionLobby.MaxWaiting, $"the lobby did not keep its bound");
            Assert.That(strays.FindLastIndex(IsClosed), Is.EqualTo(many - ConnectionLobby.MaxWaiting - 1), "those that waited longest go");
            await Migrate(source, port, multifd).WaitAsync(s_atOnce);
            Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{destination.Engine.Query().Error}");
        }
        finally
        {
            strays.ForEach(static s => s.Dispose());
        }
    }

    /// <summary>A source that prepares its devices for long is silent meanwhile. Other connections come and go.</summary>
    [Test]
    public async Task ASlowSourceIsWaitedForWhileStraysComeAndGo([Values] bool multifd)
    {
        using TestVm source = TestVm.WithRam(Size).FilledRandom(3), destination = TestVm.WithRam(Size, incoming: true);
        using ManualResetEventSlim prepares = new(), goOn = new();
        source.Vm.SaveVm.Register(new SaveVmRegistration { IdStr = "slow", InstanceId = 0 }, SaveVmHandlers.Of(new SlowPrepare(prepares, goOn)));
        destination.Vm.SaveVm.Register(new SaveVmRegistration { IdStr = "slow", InstanceId = 0 }, SaveVmHandlers.Of(new SlowPrepare(null, null)));
        source.Vm.Cont();
        (Task<MigrationStatus> incoming, int port) = Listen(destination, multifd, keepListening: false);
        Task migrated = Migrate(source, port, multifd);
        Assert.That(prepares.Wait(s_deadline), "the source did not begin");
        foreach (Stray stray in Enum.GetValues<Stray>())
        {
            using Socket one = Connect(port);
            Play(one, stray);
        }
        using Socket last = Connect(port);
        Play(last, Stray.Garbage);
        WaitClosed(last);
        goOn.Set();
        await migrated.WaitAsync(s_deadline);
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{destination.Engine.Query().Error}");
    }

    /// <summary>Every part of a set. A set that is whole at one moment is not abandoned: it is loaded, and fails if its source has gone.</summary>
    private static IEnumerable<object[]> Abandoned() =>
        from open in (bool[])[false, true]
        from header in (bool[])[false, true]
        from channels in (int[])[0, 1, 2]
        where !(open && header && channels == 2)
        select (object[])[open, header, channels];

    /// <summary>A source that was stopped while it connected leaves part of its channels behind, perhaps open: its host may have frozen.</summary>
    [TestCaseSource(nameof(Abandoned))]
    public async Task AnAbandonedSetDoesNotHinderTheNext(bool open, bool header, int channels)
    {
        using TestVm source = TestVm.WithRam(Size).FilledRandom(4), destination = TestVm.WithRam(Size, incoming: true);
        source.Vm.Cont();
        (Task<MigrationStatus> incoming, int port) = Listen(destination, multifd: true, keepListening: false);
        using Socket main = Connect(port);
        if (header) main.Send([.. StreamHeader.Start, 7]);
        var data = new List<Socket>();
        for (int i = 0; i < channels; i++)
        {
            // A set that is whole for a moment is an attempt, so the last channel opens after the first has gone.
            if (!open && i == 1) data[0].Dispose();
            data.Add(Connect(port));
            data[i].Send(MultifdPacket.Preamble(Guid.Empty, (byte)i));
        }
        if (!open)
        {
            main.Dispose();
            foreach (Socket one in data) one.Dispose();
        }
        await Migrate(source, port, multifd: true).WaitAsync(s_atOnce);
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{destination.Engine.Query().Error}");
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
        foreach (Socket one in data) one.Dispose();
    }

    /// <summary>Channels of two sources that connect together could be mixed up, so they are refused.</summary>
    [Test]
    public async Task ChannelsOfTwoSourcesAreNeverMixed()
    {
        using TestVm destination = TestVm.WithRam(Size, incoming: true);
        (Task<MigrationStatus> incoming, int port) = Listen(destination, multifd: true, keepListening: false);
        using Socket main = Connect(port), other = Connect(port);
        main.Send([.. StreamHeader.Start, 7]);
        using Socket first = Connect(port), second = Connect(port), third = Connect(port);
        first.Send(MultifdPacket.Preamble(Guid.Empty, 0));
        second.Send(MultifdPacket.Preamble(Guid.Empty, 0));
        third.Send(MultifdPacket.Preamble(Guid.Empty, 1));
        main.Send([0, 0, 0, 4, .. "none"u8, 1]);
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(destination.Engine.Query().Error!.Message, Does.Contain("the source opened at least 3 multifd channels"));
    }

    [Test]
    public async Task StraysDuringALoadWaitForTheNextAttempt([Values] bool multifd)
    {
        using TestVm first = TestVm.WithRam(Size).FilledRandom(5), second = TestVm.WithRam(Size).FilledRandom(6), destination = TestVm.WithRam(Size, incoming: true);
        first.Vm.Cont();
        second.Vm.Cont();
        (Task<MigrationStatus> incoming, int port) = Listen(destination, multifd, keepListening: true);
        first.Engine.SetCapabilities([new(MigrationCapability.PauseBeforeSwitchover, true)]);
        Task<MigrationStatus> cancelled = Start(first, At(port), multifd);
        LeakCheck.WaitFor(() => first.Engine.Status == MigrationStatus.PreSwitchover, "the first source did not come to its switchover");
        List<Socket> strays = [.. Enum.GetValues<Stray>().Select(_ => Connect(port))];
        for (int i = 0; i < strays.Count; i++) Play(strays[i], (Stray)i);
        Task migrated = Migrate(second, port, multifd: false);
        first.Engine.Cancel();
        Assert.That(await cancelled.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Cancelled));
        destination.Engine.SetCapabilities([new(MigrationCapability.Multifd, false)]);
        await migrated.WaitAsync(s_deadline);
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{destination.Engine.Query().Error}");
        RamAssert.AreEqual(second.Vm.Memory, destination.Vm.Memory);
        strays.ForEach(static s => s.Dispose());
    }

    [Test]
    public void WhatNeverSaysWhatItIsExpires()
    {
        using var listener = MigrationListener.Listen(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        using var lobby = new ConnectionLobby(listener, StreamHeader.Start, Microsoft.Extensions.Logging.Abstractions.NullLogger.Instance, TimeSpan.FromMilliseconds(100));
        int port = listener.Addresses[0].Port;
        using Socket silent = Connect(port), half = Connect(port), data = Connect(port);
        Play(half, Stray.HalfHeader);
        data.Send(MultifdPacket.Preamble(Guid.Empty, 0));
        LeakCheck.WaitFor(() => lobby.Wait(listener.Stopped, 1000) && silent.Poll(0, SelectMode.SelectRead) && IsClosed(half) && IsClosed(data), "the connections were not closed");
        Assert.That(lobby.Waiting, Is.Empty);

        // A main channel waits for as long as a load takes, and its channels with it.
        using Socket main = Connect(port), other = Connect(port), last = Connect(port);
        main.Send([.. StreamHeader.Start, 7]);
        other.Send(MultifdPacket.Preamble(Guid.Empty, 0));
        LeakCheck.WaitFor(() => lobby.Wait(listener.Stopped, 1000) && IsClosed(last), "the silent connection was not closed");
        Assert.That(lobby.Waiting.Select(static c => c.Kind), Is.EqualTo(new[] { ConnectionKind.Main, ConnectionKind.Data }));
    }

    /// <summary>Connections that look like channels of multifd are bounded as well, and do not keep a source out.</summary>
    [Test]
    public async Task HundredsOfChannelsWithoutAMainChannelCostNothing([Values] bool multifd)
    {
        using TestVm source = TestVm.WithRam(Size).FilledRandom(7), destination = TestVm.WithRam(Size, incoming: true);
        source.Vm.Cont();
        (Task<MigrationStatus> incoming, int port) = Listen(destination, multifd, keepListening: false);
        List<Socket> strays = [.. Enumerable.Range(0, 600).Select(_ => Connect(port))];
        try
        {
            for (int i = 0; i < strays.Count; i++)
                if (!IsClosed(strays[i])) Caught.By(() => strays[i].Send(MultifdPacket.Preamble(Guid.Empty, (byte)i)));
            LeakCheck.WaitFor(() => strays.Count(IsClosed) >= 600 - ConnectionLobby.MaxWaiting, "the lobby did not keep its bound");
            // Those that are left would count as the source's if it came at once.
            await Migrate(source, port, multifd).WaitAsync(s_deadline);
            Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{destination.Engine.Query().Error}");
        }
        finally
        {
            strays.ForEach(static s => s.Dispose());
        }
    }

    [Test]
    public async Task ACancelEndsTheWaitWithStraysThere([Values] bool multifd)
    {
        using TestVm destination = TestVm.WithRam(Size, incoming: true);
        (Task<MigrationStatus> incoming, int port) = Listen(destination, multifd, keepListening: true);
        using Socket silent = Connect(port), half = Connect(port);
        Play(half, Stray.HalfHeader);
        destination.Engine.Cancel();
        Assert.That(await incoming.WaitAsync(s_atOnce), Is.EqualTo(MigrationStatus.Cancelled));
        WaitClosed(silent);
        WaitClosed(half);
    }

    [Test]
    public void AForeignConnectionIsNamedInTheLog()
    {
        var log = new RecordingLogger();
        using ServiceProvider provider = WithLog(log);
        using Vm destination = provider.GetRequiredService<VmFactory>().Create(new VmOptions { Memory = [new RamBlockOptions { Name = "m", SizeBytes = Size }], IsIncoming = true });
        var engine = destination.Services.GetRequiredService<Vmm.Migration.Engine.IMigrationEngine>();
        engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"));
        using Socket one = Connect(engine.Query().SocketAddresses[0].Port);
        Play(one, Stray.Garbage);
        WaitClosed(one);
        LeakCheck.WaitFor(() => log.Lines.Any(static l => l.Contains("begins with 474554202f204854", StringComparison.Ordinal)), "the log does not name the first bytes");
    }

    [Test]
    public void TheSocketOfAnIncomingMigrationIsTheOwnersAlone()
    {
        using var folder = new TempDirectory();
        using TestVm destination = TestVm.WithRam(Size, incoming: true);
        destination.Engine.MigrateIncoming(MigrationAddress.Parse($"unix:{folder["s"]}"));
        Assert.That(File.GetUnixFileMode(folder["s"]), Is.EqualTo(UnixFileMode.UserRead | UnixFileMode.UserWrite));
    }

    private static ServiceProvider WithLog(ILoggerProvider log)
    {
        var services = new ServiceCollection();
        services.AddLogging(logging => logging.AddProvider(log));
        services.AddVmm().AddMigration();
        return services.BuildServiceProvider();
    }

    private static (Task<MigrationStatus> Incoming, int Port) Listen(TestVm destination, bool multifd, bool keepListening)
    {
        destination.Engine.SetCapabilities([new(MigrationCapability.Multifd, multifd)]);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"), keepListening);
        return (incoming, destination.Engine.Query().SocketAddresses[0].Port);
    }

    private static Task<MigrationStatus> Start(TestVm source, MigrationAddress to, bool multifd)
    {
        source.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true), new(MigrationCapability.Multifd, multifd)]);
        return source.Engine.Migrate(to);
    }

    private static Task Migrate(TestVm source, int port, bool multifd) => Migrate(source, At(port), multifd);

    private static async Task Migrate(TestVm source, MigrationAddress to, bool multifd) =>
        Assert.That(await Start(source, to, multifd), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");

    private static MigrationAddress At(int port) => MigrationAddress.Parse($"tcp:127.0.0.1:{port}");

    private static Socket Connect(int port) => Connect(At(port));

    private static Socket Connect(MigrationAddress to)
    {
        bool unix = to.Transport == MigrationTransport.Unix;
        var socket = new Socket(unix ? AddressFamily.Unix : AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Unspecified);
        socket.Connect(unix ? new UnixDomainSocketEndPoint(to.Path) : new IPEndPoint(IPAddress.Loopback, to.Port));
        return socket;
    }

    private static void Play(Socket socket, Stray stray)
    {
        byte[] bytes = stray switch
        {
            Stray.Garbage => [.. "GET / HTTP/1.0\r\n\r\n"u8],
            Stray.AlmostHeader => [.. "QEVM"u8, 0, 0, 0, 9, .. "none"u8],
            Stray.HalfHeader or Stray.HalfHeaderClose => [.. "QEV"u8],
            Stray.HeaderClose => StreamHeader.Start,
            Stray.HalfPreambleClose => MultifdPacket.Preamble(Guid.Empty, 0)[..20],
            Stray.PreambleClose => MultifdPacket.Preamble(Guid.Empty, 0),
            _ => [],
        };
        socket.Send(bytes);
        if (stray == Stray.Reset) socket.LingerState = new LingerOption(true, 0);
        if (stray is Stray.Close or Stray.Reset or Stray.HalfHeaderClose or Stray.HeaderClose or Stray.HalfPreambleClose or Stray.PreambleClose) socket.Dispose();
    }

    private static bool IsClosed(Socket socket)
    {
        try
        {
            return socket.Poll(0, SelectMode.SelectRead) && socket.Receive(new byte[1], SocketFlags.Peek) == 0;
        }
        catch (SocketException)
        {
            return true;
        }
    }

    private static void WaitClosed(Socket socket) => LeakCheck.WaitFor(() => IsClosed(socket), "the connection was not closed");

    private sealed class SlowPrepare(ManualResetEventSlim? reached, ManualResetEventSlim? gate) : ISavePrepare, ILoadSetup
    {
        public SaveRoles SavePrepare(SaveContext context)
        {
            reached?.Set();
            gate?.Wait(s_deadline);
            return new SaveRoles();
        }

        public LoadRoles LoadSetup(LoadContext context) => new();
    }

    /// <summary>Keeps what was logged.</summary>
    private sealed class RecordingLogger : ILoggerProvider, ILogger
    {
        private readonly List<string> _lines = [];

        internal string[] Lines
        {
            get { lock (_lines) return [.. _lines]; }
        }

        public ILogger CreateLogger(string categoryName) => this;

        public void Log<TState>(LogLevel logLevel, EventId eventId, TState state, Exception? exception, Func<TState, Exception?, string> formatter)
        {
            lock (_lines) _lines.Add(formatter(state, exception));
        }

        public bool IsEnabled(LogLevel logLevel) => true;

        public IDisposable? BeginScope<TState>(TState state)
            where TState : notnull => null;

        public void Dispose()
        {
        }
    }
}
