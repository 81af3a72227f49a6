using Microsoft.Extensions.Logging.Abstractions;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Wire;
using Vmm.Migration.Channels;
using Vmm.Migration.Snapshot;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Snapshots;

/// <summary>A snapshot that is reported as saved is on disk, and one that is not leaves nothing behind.</summary>
[TestFixture]
internal sealed class SnapshotStoreTests
{
    private TempDirectory _folder = null!;

    private string Place => _folder["state/store"];

    [SetUp]
    public void Start() => _folder = new TempDirectory();

    [TearDown]
    public void End() => _folder.Dispose();

    /// <summary>Fails every sync in turn, until one save needs no further one.</summary>
    [Test]
    public void EverySyncThatFailsFailsTheSaveAndKeepsTheSnapshotBefore([Values] bool replaces)
    {
        if (replaces) Save(Store(), "s", "old", overwrite: false);
        int syncs = 0;
        for (int failing = 0; ; failing++)
        {
            int calls = 0;
            DirectorySnapshotStore store = Store(_ => calls++ == failing ? Errno.EIO : Errno.None);
            try
            {
                Save(store, "s", "new", overwrite: true);
                break;
            }
            catch (ChannelException e)
            {
                syncs++;
                Assert.That(VmmException.Describe(e), Does.Contain("cannot sync").And.Contain("Input/output error"));
                Assert.That(e.Errno, Is.EqualTo(Errno.EIO));
                Assert.That(Store().List().Select(static m => m.Machine), Is.EqualTo(replaces ? (string[])["old"] : []));
                Assert.That(Entries(), Is.EqualTo(replaces ? (string[])["s"] : []), "nothing is left behind");
                if (!replaces && Directory.Exists(Place)) Directory.Delete(Path.GetDirectoryName(Place)!, recursive: true);
            }
        }
        // The stream and its directory, the manifest and its directory, the parent; and the two directories that the first save makes.
        Assert.That(syncs, Is.EqualTo(replaces ? 5 : 7));
        Assert.That(Store().List().Select(static m => m.Machine), Is.EqualTo((string[])["new"]));
        Assert.That(Entries(), Is.EqualTo((string[])["s"]));
    }

    [Test]
    public void WhatADeadProcessLeftIsRemovedAndWhatALivingOneWritesIsNot()
    {
        DirectorySnapshotStore dead = Store(), living = Store();
        (string abandoned, FileChannel file) = dead.Begin();
        file.Dispose();
        (string kept, file) = living.Begin();
        file.Dispose();
        Assert.That(Entries(), Has.Length.EqualTo(2), "both are being written");
        // The kernel does this for a process that dies.
        Directory.Move(abandoned, _folder["aside"]);
        dead.Discard(abandoned);
        Directory.Move(_folder["aside"], abandoned);
        Save(Store(), "s", "new", overwrite: false);
        Assert.That(Entries(), Is.EquivalentTo((string[])[Path.GetFileName(kept), "s"]));
        living.Discard(kept);
        Assert.That(Entries(), Is.EqualTo((string[])["s"]));
    }

    [Test]
    public void NobodyElseCanReadASnapshot()
    {
        Save(Store(), "s", "new", overwrite: false);
        const UnixFileMode folder = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute, file = UnixFileMode.UserRead | UnixFileMode.UserWrite;
        Assert.That(File.GetUnixFileMode(Place), Is.EqualTo(folder));
        Assert.That(File.GetUnixFileMode(Path.Combine(Place, "s")), Is.EqualTo(folder));
        foreach (string one in Directory.GetFiles(Path.Combine(Place, "s"))) Assert.That(File.GetUnixFileMode(one), Is.EqualTo(file), one);
    }

    [TestCase("{\"name\":null}")]
    [TestCase("null")]
    [TestCase("")]
    [TestCase("[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[")]
    public void ADamagedManifestIsNamedAndLeftOutOfTheList(string text)
    {
        Save(Store(), "s", "new", overwrite: false);
        File.WriteAllText(Path.Combine(Place, "s", ManifestFile.Name), text);
        Assert.That(() => Store().Find("s"), Throws.TypeOf<StreamFormatException>().With.Message.Contains("snapshot 's': manifest.json"));
        Assert.That(Store().List(), Is.Empty);
    }

    [Test]
    public void AManifestThatIsNoSmallFileIsRefusedAtOnce()
    {
        Save(Store(), "s", "new", overwrite: false);
        string manifest = Path.Combine(Place, "s", ManifestFile.Name);
        using (FileStream file = File.OpenWrite(manifest)) file.SetLength(WireLimits.ManifestBytes + 1);
        Assert.That(() => Store().Find("s"), Throws.TypeOf<StreamLimitException>().With.Message.Contains("WireLimits.ManifestBytes"));
        File.Delete(manifest);
        Assert.That(Shell.Run("mkfifo", manifest).Status, Is.Zero);
        Assert.That(() => Store().Find("s"), Throws.TypeOf<StreamFormatException>().With.Message.Contains("FIFO"));
    }

    private DirectorySnapshotStore Store(Func<OwnedFd, Errno>? sync = null) => new(Place, NullLogger.Instance, sync);

    private string?[] Entries() => Directory.Exists(Place) ? [.. Directory.EnumerateFileSystemEntries(Place).Select(Path.GetFileName)] : [];

    private static void Save(DirectorySnapshotStore store, string name, string machine, bool overwrite)
    {
        (string aside, FileChannel file) = store.Begin();
        try
        {
            using (file)
            {
                file.Write([1, 2, 3]);
                file.Drain(TimeSpan.Zero);
            }
            store.Commit(aside, new SnapshotManifest
            {
                Name = name, Machine = machine, CreatedUtc = DateTimeOffset.UnixEpoch, StreamBytes = 3, RamBytes = 0, VmClockNs = 0, Checksum = "x", RunState = "running",
            }, overwrite);
        }
        finally
        {
            store.Discard(aside);
        }
    }
}
