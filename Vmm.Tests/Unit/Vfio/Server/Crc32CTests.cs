using Vmm.Devices.Vfio.User.Backend;

namespace Vmm.Tests.Unit.Vfio.Server;

[TestFixture]
internal sealed class Crc32CTests
{
    [Test]
    public void TheCheckValueOfTheCatalogue() => Assert.That(~Crc32C.Append(Crc32C.Initial, "123456789"u8), Is.EqualTo(0xe3069283u));

    [Test]
    public void LanesGiveWhatBytesGive([Values(0, 1, 7, 8, 4095, 12287, 12288, 12289, 40_000)] int length)
    {
        byte[] bytes = new byte[length];
        new Random(length).NextBytes(bytes);
        uint slow = Crc32C.Initial;
        for (int i = 0; i < length; i++) slow = Crc32C.Append(slow, bytes.AsSpan(i, 1));
        Assert.That(Crc32C.Append(Crc32C.Initial, bytes), Is.EqualTo(slow));
        Assert.That(Crc32C.Append(Crc32C.Append(Crc32C.Initial, bytes.AsSpan(0, length / 3)), bytes.AsSpan(length / 3)), Is.EqualTo(slow));
    }
}
