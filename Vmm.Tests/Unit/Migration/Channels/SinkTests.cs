using System.Diagnostics;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.RunStates;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Channels;

/// <summary>A command, pipe or file that did not take the whole stream fails the migration, and none of them can hold a migration up.</summary>
[TestFixture]
internal sealed class SinkTests
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30), s_soon = TimeSpan.FromSeconds(10);

    private TempDirectory _folder = null!;
    private TestVm _source = null!;

    [SetUp]
    public void Start()
    {
        _folder = new TempDirectory();
        // The whole stream of blank RAM fits into a pipe.
        _source = TestVm.WithRam(1 << 20);
        _source.Vm.Cont();
    }

    [TearDown]
    public void End()
    {
        _source.Dispose();
        _folder.Dispose();
    }

    [TestCase("true", "bytes unread")]
    [TestCase("exec true", "bytes unread")]
    [TestCase("exec < /dev/null; sleep 0.2", "bytes unread")]
    [TestCase("head -c 100 > /dev/null", "bytes unread")]
    [TestCase("exec 0<&-; exit 3", "exit status 3")]
    [TestCase("cat > /dev/null; exit 3", "exit status 3")]
    [TestCase("kill -9 $$", "exit status 137")]
    public async Task ACommandThatDoesNotTakeTheStreamFailsTheMigration(string command, string reason)
    {
        Assert.That(await Migrate($"exec:{command}"), Is.EqualTo(MigrationStatus.Failed));
        Assert.That($"{_source.Engine.Query().Error}", Does.Contain(reason));
        Assert.That(_source.Vm.RunState.State, Is.EqualTo(RunState.Running));
        Assert.That(await Migrate($"exec:cat > {_folder["state"]}"), Is.EqualTo(MigrationStatus.Completed));
        await ExpectLoads($"exec:cat {_folder["state"]}");
    }

    [TestCase("cat > /dev/null; exec sleep 1000")]
    [TestCase("exec sleep 1000")]
    public async Task ACommandThatDoesNotEndCanBeCancelled(string command)
    {
        Task<MigrationStatus> outgoing = _source.Engine.Migrate(MigrationAddress.Parse($"exec:{command}"));
        LeakCheck.WaitFor(() => _source.Engine.Status == MigrationStatus.Device, "the migration did not come to its end");
        var clock = Stopwatch.StartNew();
        _source.Engine.Cancel();
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Cancelled));
        Assert.That(clock.Elapsed, Is.LessThan(s_soon));
        Assert.That(_source.Vm.RunState.State, Is.EqualTo(RunState.Running));
    }

    [Test]
    public async Task AReaderThatClosesItsEndOfAPipeFailsTheMigrationAndOneThatReadsGetsTheStream()
    {
        (OwnedFd read, OwnedFd write) = Posix.Pipe();
        Task<MigrationStatus> outgoing;
        using (write) outgoing = _source.Engine.Migrate(MigrationAddress.Parse($"fd:{write.Number}"));
        LeakCheck.WaitFor(() => _source.Engine.Status == MigrationStatus.Device, "the migration did not come to its end");
        read.Dispose();
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That($"{_source.Engine.Query().Error}", Does.Contain("bytes unread").Or.Contain("Broken pipe"), "the last bytes were written before or after the reader closed");
        Assert.That(_source.Vm.RunState.State, Is.EqualTo(RunState.Running));
        (read, write) = Posix.Pipe();
        using (read)
        {
            using (write) outgoing = _source.Engine.Migrate(MigrationAddress.Parse($"fd:{write.Number}"));
            await ExpectLoads($"fd:{read.Number}");
        }
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
    }

    /// <summary>The cancelled stream must not be whole: its reader would load a second copy of the VM.</summary>
    [Test]
    public async Task WhatACancelledMigrationLeftInAPipeIsNoSecondCopy()
    {
        (OwnedFd read, OwnedFd write) = Posix.Pipe();
        using OwnedFd reader = read;
        Task<MigrationStatus> outgoing;
        using (write) outgoing = _source.Engine.Migrate(MigrationAddress.Parse($"fd:{write.Number}"));
        LeakCheck.WaitFor(() => _source.Engine.Status == MigrationStatus.Device, "the migration did not come to its end");
        _source.Engine.Cancel();
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Cancelled));
        using TestVm destination = TestVm.WithRam(1 << 20, incoming: true);
        Assert.That(await destination.Engine.MigrateIncoming(MigrationAddress.Parse($"fd:{read.Number}")).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(_source.Vm.RunState.State, Is.EqualTo(RunState.Running));
    }

    [Test]
    public async Task AFifoIsNeverWaitedForAndCarriesTheStreamToItsReader()
    {
        string fifo = Fifo();
        Assert.That(() => Migrate($"file:{fifo}"), Throws.TypeOf<ChannelException>().With.Message.EqualTo($"nobody reads the FIFO '{fifo}'"));
        Assert.That(() => Migrate($"file:{fifo},offset=4096"), Throws.TypeOf<ConfigurationException>());
        using TestVm destination = TestVm.WithRam(1 << 20, incoming: true);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse($"file:{fifo}"));
        Assert.That(await Migrate($"file:{fifo}"), Is.EqualTo(MigrationStatus.Completed));
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
    }

    [Test]
    public async Task AFifoWhoseReaderSleepsCanBeCancelled()
    {
        string fifo = Fifo();
        _source.FilledRandom(1);
        using OwnedFd reader = Posix.Open(fifo, Posix.O_RDONLY | Posix.O_NONBLOCK, 0, out _)!;
        Task<MigrationStatus> outgoing = _source.Engine.Migrate(MigrationAddress.Parse($"file:{fifo}"));
        using OwnedFd writer = Posix.Open(fifo, Posix.O_WRONLY | Posix.O_NONBLOCK, 0, out _)!;
        LeakCheck.WaitFor(() => Posix.Poll(writer, Posix.POLLOUT, null, 0, out _) == 0, "the FIFO did not fill");
        _source.Engine.Cancel();
        Assert.That(await outgoing.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Cancelled));
        Assert.That(_source.Vm.RunState.State, Is.EqualTo(RunState.Running));
    }

    [Test]
    public async Task AFifoThatNobodyWritesCanBeCancelled()
    {
        string fifo = Fifo();
        using TestVm destination = TestVm.WithRam(1 << 20, incoming: true);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse($"file:{fifo}"));
        LeakCheck.WaitFor(() => destination.Engine.Status == MigrationStatus.Active, "the load did not begin");
        destination.Engine.Cancel();
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Cancelled));
    }

    [Test]
    public async Task ASyncThatFailsFailsTheMigration([Values] bool ofTheDirectory)
    {
        int calls = 0;
        FileChannel file = FileChannel.Create(_folder["state"], 0, _ => calls++ == (ofTheDirectory ? 1 : 0) ? Errno.EIO : Errno.None);
        Assert.That(await _source.Engine.Migrate(file).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Failed));
        Assert.That($"{_source.Engine.Query().Error}", Does.Contain("cannot sync").And.Contain("Input/output error"));
        Assert.That(_source.Vm.RunState.State, Is.EqualTo(RunState.Running));
        Assert.That(File.Exists(_folder["state"]), Is.False);
    }

    private Task<MigrationStatus> Migrate(string uri) => _source.Engine.Migrate(MigrationAddress.Parse(uri)).WaitAsync(s_deadline);

    private static async Task ExpectLoads(string uri)
    {
        using TestVm destination = TestVm.WithRam(1 << 20, incoming: true);
        Assert.That(await destination.Engine.MigrateIncoming(MigrationAddress.Parse(uri)).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
    }

    private string Fifo()
    {
        string path = _folder["fifo"];
        Assert.That(Shell.Run("mkfifo", path).Status, Is.Zero);
        return path;
    }
}
