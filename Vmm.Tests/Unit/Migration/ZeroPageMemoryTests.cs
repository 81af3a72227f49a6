using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration;

/// <summary>A destination gives memory only to pages with data, whatever its attempts before have left: a zero page that has none stays without.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class ZeroPageMemoryTests
{
    private const ulong Size = 32 << 20;
    private const int Pages = (int)(Size / 4096);
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(60);

    /// <summary>Not with a shared file: a file system gives memory to more pages than were written.</summary>
    [TestCase(false, false, false)]
    [TestCase(false, false, true)]
    [TestCase(false, true, false)]
    [TestCase(true, false, false)]
    [TestCase(true, false, true)]
    [TestCase(true, true, false)]
    public async Task AnAttemptAfterACancelledOneGivesZeroPagesNoMemory(bool multifd, bool shared, bool file)
    {
        using var folder = new TempDirectory();
        using TestVm source = TestVm.WithRam(Size), destination = Destination(folder, shared, file);
        byte[] content = new byte[4096];
        new Random(1).NextBytes(content);
        // Data in every 16th page, in the order in which pages are sent.
        for (long page = 0; page < Pages; page += 16) content.CopyTo(source.Ram.Slice((ulong)page * 4096, 4096));
        source.Vm.Cont();
        foreach (TestVm vm in (TestVm[])[source, destination])
            vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true), new(MigrationCapability.Multifd, multifd), new(MigrationCapability.PauseBeforeSwitchover, true)]);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"), keepListening: true);
        var to = MigrationAddress.Parse($"tcp:127.0.0.1:{destination.Engine.Query().SocketAddresses[0].Port}");
        Task<MigrationStatus> first = source.Engine.Migrate(to);
        LeakCheck.WaitFor(() => source.Engine.Status == MigrationStatus.PreSwitchover, "the first attempt did not come to its switchover");
        source.Engine.Cancel();
        Assert.That(await first.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Cancelled));
        LeakCheck.WaitFor(() => destination.Engine.Status == MigrationStatus.Failed, "the destination did not notice the cancel");
        source.Engine.SetCapabilities([new(MigrationCapability.PauseBeforeSwitchover, false)]);
        Assert.That(await source.Engine.Migrate(to).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        var holes = new DirtyBitmap(Pages);
        destination.Ram.FindHoles(holes);
        Assert.That(holes.Count(), Is.EqualTo(Pages - (Pages / 16)));
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
    }

    /// <summary>A page of the first attempt that is zero in the second must be cleared, although its block is mostly without memory.</summary>
    [Test]
    public async Task WhatAnAttemptBeforeHasWrittenIsCleared([Values] bool multifd, [Values] bool shared, [Values] bool file)
    {
        using var folder = new TempDirectory();
        using TestVm other = TestVm.WithRam(Size).FilledRandom(2), source = TestVm.WithRam(Size).FilledRandom(3, halfZero: true), destination = Destination(folder, shared, file);
        foreach (TestVm vm in (TestVm[])[other, source, destination])
            vm.Engine.SetCapabilities([new(MigrationCapability.ReturnPath, true), new(MigrationCapability.Multifd, multifd), new(MigrationCapability.PauseBeforeSwitchover, vm == other)]);
        Task<MigrationStatus> incoming = destination.Engine.MigrateIncoming(MigrationAddress.Parse("tcp:127.0.0.1:0"), keepListening: true);
        var to = MigrationAddress.Parse($"tcp:127.0.0.1:{destination.Engine.Query().SocketAddresses[0].Port}");
        other.Vm.Cont();
        Task<MigrationStatus> first = other.Engine.Migrate(to);
        LeakCheck.WaitFor(() => other.Engine.Status == MigrationStatus.PreSwitchover, "the first attempt did not come to its switchover");
        other.Engine.Cancel();
        Assert.That(await first.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Cancelled));
        LeakCheck.WaitFor(() => destination.Engine.Status == MigrationStatus.Failed, "the destination did not notice the cancel");
        Assert.That(destination.Vm.RunState.State, Is.EqualTo(RunState.InMigrate));
        Assert.That(await source.Engine.Migrate(to).WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed), () => $"{source.Engine.Query().Error}");
        Assert.That(await incoming.WaitAsync(s_deadline), Is.EqualTo(MigrationStatus.Completed));
        RamAssert.AreEqual(source.Vm.Memory, destination.Vm.Memory);
    }

    private static TestVm Destination(TempDirectory folder, bool shared, bool file) => new(new VmOptions
    {
        Memory = [new RamBlockOptions { Name = "m", SizeBytes = Size, IsShared = shared, FilePath = file ? folder["ram"] : null }], IsIncoming = true,
    });
}
