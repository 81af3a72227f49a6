using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Core.Interop;

/// <summary>The listener of UNIX sockets: who may connect, which file it replaces, and which file it removes.</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
internal sealed class UnixListenerTests : IDisposable
{
    private const UnixFileMode OwnerOnly = UnixFileMode.UserRead | UnixFileMode.UserWrite;

    private readonly TempDirectory _folder = new();

    private string Path => _folder["s"];

    public void Dispose() => _folder.Dispose();

    [Test]
    public void TheSocketAndTheFoldersItMakesAreTheOwnersAlone()
    {
        UnixFileMode before = OwnerOnly | UnixFileMode.UserExecute | UnixFileMode.GroupExecute;
        Directory.CreateDirectory(_folder["there"], before);
        string path = _folder["there/new/newer/s"];
        using var listener = UnixListener.Listen(path, 1);
        using (Assert.EnterMultipleScope())
        {
            Assert.That(File.GetUnixFileMode(path), Is.EqualTo(OwnerOnly));
            Assert.That(File.GetUnixFileMode(_folder["there/new"]), Is.EqualTo(OwnerOnly | UnixFileMode.UserExecute));
            Assert.That(File.GetUnixFileMode(_folder["there/new/newer"]), Is.EqualTo(OwnerOnly | UnixFileMode.UserExecute));
            Assert.That(File.GetUnixFileMode(_folder["there"]), Is.EqualTo(before), "an existing folder keeps its mode");
            Assert.That(Directory.GetFiles(_folder["there/new/newer"]), Has.Length.EqualTo(1), "no file with a temporary name is left");
        }
        Connect(path);
    }

    [Test]
    public void DisposeRemovesTheFileAndAnotherTimeDoesNothing()
    {
        var listener = UnixListener.Listen(Path, 1);
        listener.Dispose();
        Assert.That(File.Exists(Path), Is.False);
        File.WriteAllText(Path, "");
        listener.Dispose();
        Assert.That(File.Exists(Path));
    }

    [Test]
    public void OneThatEndsLateLeavesItsSuccessorsSocket()
    {
        var late = UnixListener.Listen(Path, 1);
        File.Delete(Path);
        using (var successor = UnixListener.Listen(Path, 1))
        {
            late.Dispose();
            Connect(Path);
        }
        Assert.That(File.Exists(Path), Is.False);
    }

    [Test]
    public void OneThatMovesInTakesThePlaceAndTheOldOneLeavesIt()
    {
        var old = UnixListener.Listen(Path, 1);
        using (var next = UnixListener.Listen(_folder["next"], 1))
        {
            next.MoveTo(Path);
            old.Dispose();
            Connect(Path);
            Assert.That((next.Path, Posix.Poll(next.Socket, Posix.POLLIN, null, 0, out _)), Is.EqualTo((Path, Posix.POLLIN)), "the next listener has the connection");
        }
        Assert.That(Directory.GetFileSystemEntries(_folder.Path), Is.Empty);
    }

    [Test]
    public void OneThatWasAdoptedIsRemovedByItsNewOwner()
    {
        var maker = UnixListener.Listen(Path, 1);
        var owner = UnixListener.Adopt(Posix.Duplicate(maker.Socket), Path);
        maker.RemovesFile = false;
        maker.Dispose();
        Connect(Path);
        owner.Dispose();
        Assert.That(File.Exists(Path), Is.False);
    }

    [Test]
    public void AStaleSocketIsReplaced()
    {
        using (OwnedFd stale = Posix.Socket(Posix.AF_UNIX)) Posix.Bind(stale, Posix.UnixAddress(Path));
        using var listener = UnixListener.Listen(Path, 1);
        Connect(Path);
    }

    [Test]
    public void WhatElseIsThereIsRefusedAndStays()
    {
        using var other = UnixListener.Listen(_folder["live"], 1);
        File.WriteAllText(_folder["file"], "precious");
        File.CreateSymbolicLink(_folder["link"], _folder["elsewhere"]);
        Directory.CreateDirectory(_folder["folder"]);
        using (Assert.EnterMultipleScope())
        {
            Assert.That(Refusal("live"), Does.Contain("in use by another process"));
            Assert.That(Refusal("file"), Does.Contain("not a socket"));
            Assert.That(Refusal("link"), Does.Contain("not a socket"));
            Assert.That(Refusal("folder"), Does.Contain("not a socket"));
            Assert.That(Refusal("file/s"), Does.Contain("cannot listen at"));
            Assert.That(Refusal(new string('x', 120)), Does.Contain("1 to 107 bytes"));
            Assert.That(File.ReadAllText(_folder["file"]), Is.EqualTo("precious"));
            Assert.That(Directory.GetFileSystemEntries(_folder.Path), Has.Length.EqualTo(4), "the refused listener created no file");
        }
        Connect(_folder["live"]);
        string Refusal(string name) => Assert.Throws<ConfigurationException>(() => UnixListener.Listen(_folder[name], 1).Dispose())!.Message;
    }

    [Test]
    public void AFolderInWhichOthersCouldReplaceTheSocketIsRefused()
    {
        const UnixFileMode everybody = (UnixFileMode)0x1FF;
        Directory.CreateDirectory(_folder["open"]);
        File.SetUnixFileMode(_folder["open"], everybody);
        Assert.That(Assert.Throws<ConfigurationException>(() => UnixListener.Listen(_folder["open/s"], 1))!.Message, Does.Contain("every user can write in folder"));
        File.SetUnixFileMode(_folder["open"], everybody | UnixFileMode.StickyBit);
        UnixListener.Listen(_folder["open/s"], 1).Dispose();
        if (PrivateDirectory.CurrentUserId != 0) Assert.Ignore("only root can give a folder to somebody else");
        Directory.CreateDirectory(_folder["theirs"]);
        Assert.That(Shell.Run("chown", "12345", _folder["theirs"]).Status, Is.Zero);
        Assert.That(Assert.Throws<ConfigurationException>(() => UnixListener.Listen(_folder["theirs/s"], 1))!.Message, Does.Contain("belongs to user 12345"));
        Assert.That(Directory.GetFileSystemEntries(_folder["theirs"]).Concat(Directory.GetFileSystemEntries(_folder["open"])), Is.Empty);
    }

    [Test]
    public void AStaleSocketOfSomebodyElseIsRefusedAndStays()
    {
        if (PrivateDirectory.CurrentUserId != 0) Assert.Ignore("only root can give a socket to somebody else");
        using (OwnedFd stale = Posix.Socket(Posix.AF_UNIX)) Posix.Bind(stale, Posix.UnixAddress(Path));
        Assert.That(Shell.Run("chown", "12345", Path).Status, Is.Zero);
        Assert.That(Assert.Throws<ConfigurationException>(() => UnixListener.Listen(Path, 1))!.Message, Does.Contain("a socket of user 12345 is there"));
        Assert.That(File.Exists(Path));
    }

    [Test]
    public void ALongPathIsReachedThroughItsFolder()
    {
        string folder = _folder[string.Join('/', Enumerable.Repeat(new string('d', 100), 3))], path = folder + "/s";
        Assert.That(Assert.Throws<ConfigurationException>(() => UnixListener.Listen(path, 1))!.Message, Does.Contain("107 bytes"));
        using (UnixListener.ListenAnywhere(path, 1))
        {
            using OwnedFd client = Posix.Socket(Posix.AF_UNIX);
            Assert.That(Posix.ConnectUnix(client, path, null, 5000), Is.EqualTo(Errno.None));
            Assert.That(Assert.Throws<ConfigurationException>(() => UnixListener.ListenAnywhere(path, 1))!.Message, Does.Contain("in use"));
            Assert.That(Assert.Throws<ConfigurationException>(() => UnixListener.ListenAnywhere($"{folder}/{new string('x', 100)}", 1))!.Message, Does.Contain("107 bytes"));
        }
        Assert.That(Directory.GetFileSystemEntries(folder), Is.Empty);
        using OwnedFd another = Posix.Socket(Posix.AF_UNIX);
        Assert.That(Posix.ConnectUnix(another, path, null, 5000), Is.EqualTo(Errno.ENOENT));
    }

    private static void Connect(string path)
    {
        using OwnedFd client = Posix.Socket(Posix.AF_UNIX);
        Assert.That(Posix.Connect(client, Posix.UnixAddress(path), null, 5000), Is.EqualTo(Errno.None));
    }
}
