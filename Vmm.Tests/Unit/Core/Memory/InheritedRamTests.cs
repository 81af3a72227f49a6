using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Core.Memory;

/// <summary>A RAM block takes its memory over from the previous process.</summary>
[TestFixture]
public sealed class InheritedRamTests
{
    private const ulong Bytes = 64 << 10;

    private TempDirectory _directory = null!;

    [SetUp]
    public void SetUp() => _directory = new TempDirectory();

    [TearDown]
    public void TearDown() => _directory.Dispose();

    [TestCase(0)]
    [TestCase(4096)]
    [TestCase(100)]
    public void AFileMayBeLargerThanTheBlockInTheNextProcessToo(int more)
    {
        string file = _directory["ram"];
        File.WriteAllBytes(file, new byte[(int)Bytes + more]);
        var options = new RamBlockOptions { Name = "ram", SizeBytes = Bytes, FilePath = file };
        using var before = new RamBlock(options, new GuestAddress(0));
        before.Slice(Bytes - 1, 1)[0] = 7;
        using var after = new RamBlock(options with { Inherited = Posix.Duplicate(before.Fd) }, new GuestAddress(0));
        Assert.That((after.SizeBytes, after.ReadOnlySlice(Bytes - 1, 1)[0]), Is.EqualTo((Bytes, (byte)7)));
    }

    [TestCase(true, -4096)]
    [TestCase(false, -4096)]
    [TestCase(false, 4096)]
    public void OtherMemoryIsRefused(bool isFile, int more)
    {
        string file = _directory["ram"];
        long size = (long)Bytes + more;
        OwnedFd inherited = isFile ? Posix.Open(file, Posix.O_RDWR | Posix.O_CREAT, 0x180, out _)! : Posix.MemFd("ram", size);
        Posix.Truncate(inherited, size);
        var options = new RamBlockOptions { Name = "ram", SizeBytes = Bytes, FilePath = isFile ? file : null, Inherited = inherited };
        var error = Assert.Throws<ConfigurationException>(() => new RamBlock(options, new GuestAddress(0)).Dispose());
        Assert.That(error!.Message, Does.Contain($"{size} bytes, {Bytes} are configured"));
        Assert.That(inherited.IsClosed);
    }
}
