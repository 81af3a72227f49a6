using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Core.Interop;

/// <summary>Layouts, constants and errors of our system interface agree with the runtime's own.</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
internal sealed class PosixTests
{
    [Test]
    public void AFilesStatusIsWhatTheRuntimeSays()
    {
        using var folder = new TempDirectory();
        File.WriteAllText(folder["f"], "12345");
        File.SetUnixFileMode(folder["f"], UnixFileMode.UserRead | UnixFileMode.GroupExecute);
        using OwnedFd file = Posix.Open(folder["f"], Posix.O_RDONLY, 0, out _)!, same = Posix.Open(folder["f"], Posix.O_PATH, 0, out _)!;
        (OwnedFd read, OwnedFd write) = Posix.Pipe();
        (OwnedFd first, OwnedFd second) = Posix.SocketPair();
        using OwnedFd nothing = Posix.Open("/dev/null", Posix.O_RDWR, 0, out _)!;
        using (read) using (write) using (first) using (second)
        using (Assert.EnterMultipleScope())
        {
            FileStatus status = Status(file);
            Assert.That((status.SizeBytes, (UnixFileMode)status.Permissions, status.UserId), Is.EqualTo((5, File.GetUnixFileMode(folder["f"]), PrivateDirectory.CurrentUserId)));
            Assert.That(status.IsSameFile(Status(same)) && !status.IsSameFile(Status(nothing)));
            Assert.That((status.IsRegularFile, Status(read).IsPipe, Status(first).IsSocket, Status(nothing).IsCharacterDevice), Is.EqualTo((true, true, true, true)));
            Assert.That((status.IsSocket, Status(read).IsRegularFile, Status(first).IsPipe, Status(nothing).IsSocket), Is.EqualTo((false, false, false, false)));
        }
    }

    private static FileStatus Status(OwnedFd fd)
    {
        Assert.That(Posix.Stat(fd, out FileStatus status), Is.EqualTo(Errno.None));
        return status;
    }

    [Test]
    public void AFailedCallGivesItsErrno()
    {
        using OwnedFd memory = Posix.MemFd("sealed", 4096);
        using (Assert.EnterMultipleScope())
        {
            Assert.That(Posix.Truncate(memory, 10), Is.EqualTo(Errno.EPERM), "a sealed memfd cannot shrink");
            Assert.That(Posix.Open("/nonexistent/x", Posix.O_RDONLY, 0, out Errno errno), Is.Null);
            Assert.That(errno, Is.EqualTo(Errno.ENOENT));
            Assert.That(Posix.MakeDirectory("/", 0x1C0), Is.EqualTo(Errno.EEXIST));
            Assert.That(Posix.SeekData(memory, 5000), Is.EqualTo(-1), "the file is one hole");
            Assert.That(Posix.Receive(memory, new byte[1], 0, out errno), Is.EqualTo(-1));
            Assert.That(errno, Is.EqualTo((Errno)88), "ENOTSOCK");
        }
    }

    [Test]
    public void AClosedDescriptorIsNeverUsedByItsNumber()
    {
        OwnedFd closed = Posix.EventFd();
        closed.Dispose();
        using (Assert.EnterMultipleScope())
        {
            Assert.That(() => Posix.Read(closed, new byte[8], out _), Throws.TypeOf<ObjectDisposedException>());
            Assert.That(() => Posix.Poll(closed, Posix.POLLIN, null, 0, out _), Throws.TypeOf<ObjectDisposedException>());
            Assert.That(() => Posix.ShutdownSocket(closed, Posix.SHUT_RDWR), Throws.TypeOf<ObjectDisposedException>());
        }
    }

    [TestCase(0)]
    [TestCase(1)]
    [TestCase(16)]
    public void DescriptorsTravelWithBytes(int count)
    {
        (OwnedFd first, OwnedFd second) = Posix.SocketPair();
        var sent = new List<OwnedFd>();
        var received = new List<OwnedFd>();
        using (first) using (second)
        {
            for (int i = 0; i < count; i++) sent.Add(Posix.EventFd());
            Assert.That(Posix.SendWithFds(first, "ab"u8, "cde"u8, [.. sent], out _), Is.EqualTo(5));
            byte[] bytes = new byte[8];
            Assert.That(Posix.ReceiveWithFds(second, bytes, received, wait: true, out Errno errno), Is.EqualTo(5), $"{errno}");
            Assert.That(bytes[..5], Is.EqualTo("abcde"u8.ToArray()));
            Assert.That(received, Has.Count.EqualTo(count));
            for (int i = 0; i < count; i++) Posix.SignalEventFd(sent[i]);
            Assert.That(received.TrueForAll(static fd => Posix.Poll(fd, Posix.POLLIN, null, 0, out _) == Posix.POLLIN), "the received descriptors refer to the sent files");
        }
        foreach (OwnedFd fd in sent.Concat(received)) fd.Dispose();
    }
}
