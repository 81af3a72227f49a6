using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Migration;
using Vmm.Migration.Snapshot;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration;

[TestFixture]
public class SnapshotTests
{
    private TempDirectory _folder = null!;

    [SetUp]
    public void MakeFolder() => _folder = new TempDirectory();

    [TearDown]
    public void RemoveFolder() => _folder.Dispose();

    [Test]
    public void SaveChangeLoadGivesTheSavedMachine([Values] bool running)
    {
        using TestVm vm = Make();
        vm.FilledRandom(1, halfZero: true);
        byte[] content = vm.Ram.ReadOnlySlice(0, (int)vm.Ram.SizeBytes).ToArray();
        if (running) vm.Vm.Cont();
        SnapshotManifest manifest = Save(vm, "one");
        Assert.That(manifest.RunState, Is.EqualTo(running ? "running" : "prelaunch"));
        Assert.That(vm.Vm.RunState.IsRunning, Is.EqualTo(running));
        vm.FilledRandom(2);
        vm.Vm.Snapshots().Load("one", null, CancellationToken.None);
        Assert.That(vm.Ram.ReadOnlySlice(0, content.Length).SequenceEqual(content));
        Assert.That(vm.Vm.RunState.IsRunning, Is.EqualTo(running));
    }

    [Test]
    public async Task TheStreamIsAnOrdinaryMigrationStream()
    {
        using TestVm vm = Make();
        vm.FilledRandom(3);
        Save(vm, "s");
        using TestVm other = TestVm.WithRam(1 << 20, incoming: true);
        Assert.That(await other.Engine.MigrateIncoming(new MemoryChannel(File.ReadAllBytes(Path.Combine(_folder.Path, "store", "s", "vmstate")))), Is.EqualTo(MigrationStatus.Completed));
        RamAssert.AreEqual(vm.Vm.Memory, other.Vm.Memory);
    }

    [TestCase("")]
    [TestCase("a/b")]
    [TestCase("..")]
    [TestCase(".hidden")]
    [TestCase("with space")]
    public void ABadNameIsRefused(string name)
    {
        using TestVm vm = Make();
        Assert.That(() => Save(vm, name), Throws.TypeOf<ConfigurationException>().With.Message.Contains($"snapshot name '{name}'"));
        Assert.That(() => vm.Vm.Snapshots().Load(name, null, CancellationToken.None), Throws.TypeOf<ConfigurationException>());
        Assert.That(() => vm.Vm.Snapshots().Delete(name), Throws.TypeOf<ConfigurationException>());
    }

    [Test]
    public void AnExistingNameIsRefusedUnlessOverwritten()
    {
        using TestVm vm = Make();
        Save(vm, "twice");
        Assert.That(() => Save(vm, "twice"), Throws.TypeOf<ConfigurationException>().With.Message.EqualTo("Snapshot 'twice' already exists in one or more devices"));
        vm.Vm.Snapshots().Save("twice", overwrite: true, null, CancellationToken.None);
        Assert.That(vm.Vm.Snapshots().List().Select(m => m.Name), Is.EqualTo((string[])["twice"]));
        Assert.That(vm.Vm.Snapshots().Delete("twice"));
        Assert.That(vm.Vm.Snapshots().Delete("twice"), Is.False);
        Assert.That(Directory.GetFileSystemEntries(Path.Combine(_folder.Path, "store")), Is.Empty);
    }

    [Test]
    public void AMissingNameIsNamed()
    {
        using TestVm vm = Make();
        Assert.That(() => vm.Vm.Snapshots().Load("nope", null, CancellationToken.None),
            Throws.TypeOf<DeviceNotFoundException>().With.Message.EqualTo("Snapshot 'nope' does not exist in one or more devices"));
    }

    [Test]
    public void ADamagedSnapshotLeavesTheMachineAsItWas([Values("flip-ram", "flip-device", "cut", "empty", "manifest")] string damage)
    {
        using TestVm vm = Make();
        vm.FilledRandom(4);
        vm.Vm.Cont();
        Save(vm, "bad");
        string file = Path.Combine(_folder.Path, "store", "bad", damage == "manifest" ? "manifest.json" : "vmstate");
        byte[] bytes = File.ReadAllBytes(file);
        int device = bytes.AsSpan().LastIndexOf("globalstate\0"u8) < 0 ? bytes.AsSpan().IndexOf("globalstate"u8) : 0;
        switch (damage)
        {
            case "flip-ram": bytes[40_000] ^= 1; break;
            case "flip-device": bytes[device + 22] ^= 0xff; break;
            case "cut": bytes = bytes[..(bytes.Length / 2)]; break;
            case "empty": bytes = []; break;
            default: bytes = "{"u8.ToArray(); break;
        }
        File.WriteAllBytes(file, bytes);
        vm.FilledRandom(5);
        byte[] content = vm.Ram.ReadOnlySlice(0, (int)vm.Ram.SizeBytes).ToArray();
        Assert.That(() => vm.Vm.Snapshots().Load("bad", null, CancellationToken.None), Throws.InstanceOf<VmmException>());
        Assert.That(vm.Ram.ReadOnlySlice(0, content.Length).SequenceEqual(content), "the refused load leaves RAM as it is");
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Running));
        Assert.That(Save(vm, "good").Name, Is.EqualTo("good"), "the VM can still be saved");
    }

    [Test]
    public void AFileThatIsDeletedAfterTheCheckIsLoadedAllTheSame()
    {
        using TestVm vm = Make();
        vm.FilledRandom(7);
        byte[] content = Content(vm);
        vm.Vm.Cont();
        Save(vm, "gone");
        vm.FilledRandom(8);
        LoadAnd(vm, "gone", () => Directory.Delete(Path.Combine(_folder.Path, "store", "gone"), recursive: true));
        Assert.That(Content(vm), Is.EqualTo(content));
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Running));
    }

    [Test]
    public void ALoadThatFailsAfterTheCheckNeverRunsTheHalfState([Values("cut", "changed")] string what, [Values] bool running, [Values("load", "reset")] string wayOut)
    {
        using TestVm vm = Make();
        vm.FilledRandom(9);
        byte[] content = Content(vm);
        if (running) vm.Vm.Cont();
        Save(vm, "good");
        Save(vm, "bad");
        vm.FilledRandom(10);
        string file = Path.Combine(_folder.Path, "store", "bad", "vmstate");
        Assert.That(
            () => LoadAnd(vm, "bad", () =>
            {
                using FileStream stream = File.OpenWrite(file);
                if (what == "cut") stream.SetLength(stream.Length / 2);
                else stream.Position = stream.Length / 2;
                if (what == "changed") stream.Write([1, 2, 3, 4, 5, 6, 7, 8]);
            }),
            Throws.TypeOf<DeviceStateException>().With.Message.Contains("loading snapshot 'bad' failed after it had changed the VM").And.Message.Contains(what == "cut" ? "the stream ended" : "checksum differs"));
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.InternalError));
        Assert.That(vm.Vm.Cont, Throws.TypeOf<DeviceStateException>().With.Message.EqualTo("Resetting the Virtual Machine is required"));
        Assert.That(() => Save(vm, "worse"), Throws.TypeOf<DeviceStateException>().With.Message.Contains("internal-error"));
        if (wayOut == "reset") vm.Vm.Reset();
        else vm.Vm.Snapshots().Load("good", null, CancellationToken.None);
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(wayOut == "reset" ? RunState.PreLaunch : RunState.Paused));
        if (wayOut == "load") Assert.That(Content(vm), Is.EqualTo(content));
        vm.Vm.Cont();
        Assert.That(vm.Vm.RunState.IsRunning);
    }

    [Test]
    public async Task AVmWithAPartOfAnotherInItsRamIsNotSaved()
    {
        using TestVm source = Make();
        source.FilledRandom(11);
        Save(source, "s");
        byte[] stream = File.ReadAllBytes(Path.Combine(_folder.Path, "store", "s", "vmstate"));
        using TestVm vm = Make();
        using (vm.Vm.Bql.Acquire()) vm.Vm.RunState.Set(RunState.InMigrate);
        Assert.That(await vm.Engine.MigrateIncoming(new MemoryChannel(stream[..(stream.Length / 2)])), Is.EqualTo(MigrationStatus.Failed));
        Assert.That(() => Save(vm, "half"), Throws.TypeOf<DeviceStateException>().With.Message.EqualTo("Guest is waiting for an incoming migration"));
        Assert.That(Directory.GetFileSystemEntries(Path.Combine(_folder.Path, "store")).Select(Path.GetFileName), Is.EqualTo((string[])["s"]));
    }

    [Test]
    public void ACancelledSaveLeavesNothing()
    {
        using TestVm vm = Make();
        vm.FilledRandom(6);
        vm.Vm.Cont();
        using var cancel = new CancellationTokenSource();
        Assert.That(() => vm.Vm.Snapshots().Save("c", false, (_, _) => cancel.Cancel(), cancel.Token), Throws.InstanceOf<OperationCanceledException>());
        Assert.That(Directory.GetFileSystemEntries(Path.Combine(_folder.Path, "store")), Is.Empty);
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Running));
    }

    [Test]
    public void WhoeverChangesTheStateWaitsForASnapshot([Values("stop", "reset", "dispose")] string change)
    {
        TestVm vm = Make();
        vm.FilledRandom(5);
        vm.Vm.Cont();
        Task? changing = null;
        bool waited = false;
        vm.Vm.Snapshots().Save("s", false, (_, _) =>
        {
            if (changing is not null) return;
            using var started = new ManualResetEventSlim();
            changing = Task.Factory.StartNew(() =>
            {
                started.Set();
                if (change == "stop") vm.Vm.Stop();
                else if (change == "reset") vm.Vm.Reset();
                else vm.Vm.Dispose();
            }, TaskCreationOptions.LongRunning);
            started.Wait();
            // A change that did not wait would be through in this time.
            waited = !changing.Wait(200);
        }, CancellationToken.None);
        Assert.That(changing!.Wait(TimeSpan.FromSeconds(60)), "the change goes on when the snapshot has ended");
        Assert.That(waited, $"'{change}' did not wait for the snapshot");
        vm.Dispose();
        using TestVm other = Make();
        other.Vm.Snapshots().Load("s", null, CancellationToken.None);
    }

    private static byte[] Content(TestVm vm) => vm.Ram.ReadOnlySlice(0, (int)vm.Ram.SizeBytes).ToArray();

    /// <summary>Loads the snapshot, and runs the action once the check has read the file to its end.</summary>
    private static void LoadAnd(TestVm vm, string name, Action atEndOfCheck)
    {
        Action? once = atEndOfCheck;
        vm.Vm.Snapshots().Load(name, (done, total) => { if (done == total) Interlocked.Exchange(ref once, null)?.Invoke(); }, CancellationToken.None);
        Assert.That(once, Is.Null);
    }

    private static SnapshotManifest Save(TestVm vm, string name) => vm.Vm.Snapshots().Save(name, overwrite: false, null, CancellationToken.None);

    private TestVm Make() => new(
        new VmOptions { Memory = [new RamBlockOptions { Name = "m", SizeBytes = 1 << 20 }] },
        b => b.Services.AddSingleton(new SnapshotOptions { Directory = Path.Combine(_folder.Path, "store") }));
}
