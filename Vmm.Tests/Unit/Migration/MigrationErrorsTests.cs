using System.Text;
using Vmm.Core.Channels;
using Vmm.Migration.Status;
using Vmm.Migration.Stream;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration;

/// <summary>The error record that the other side sends: whatever it holds, this side says in plain words why the migration failed.</summary>
[TestFixture]
public sealed class MigrationErrorsTests
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);

    [TestCase("{\"message\":null}")]
    [TestCase("{\"side\":null,\"phase\":\"load\",\"message\":\"m\"}")]
    [TestCase("{\"side\":\"destination\",\"phase\":null,\"message\":\"m\"}")]
    [TestCase("{\"side\":\"destination\",\"phase\":\"load\",\"message\":null}")]
    [TestCase("{\"side\":{},\"phase\":[],\"message\":1}")]
    [TestCase("null")]
    [TestCase("[]")]
    [TestCase("")]
    [TestCase("\"")]
    [TestCase("{\"offset\":1e999}")]
    public void ARecordThatIsNoneLeavesThePlainReason(string json)
    {
        Assert.That(MigrationErrors.FromWire(Encoding.UTF8.GetBytes(json)), Is.Null);
        Assert.That(ReasonOf(json), Is.EqualTo("the destination reported error 1; its log has the cause"));
    }

    [Test]
    public void NoMemberOfARecordReachesATerminalAsItIs()
    {
        const string evil = "a\\u001b[2J\\nb", clean = "a [2J b";
        MigrationError error = MigrationErrors.FromWire(Encoding.UTF8.GetBytes(
            $"{{\"side\":\"{evil}\",\"phase\":\"{evil}\",\"message\":\"{evil}\",\"section\":\"{evil}\",\"expected\":\"{evil}\",\"found\":\"{evil}\",\"hint\":\"{evil}\"}}"))!;
        Assert.That((string?[])[error.Side, error.Phase, error.Message, error.Section, error.Expected, error.Found, error.Hint], Is.All.EqualTo(clean));
    }

    /// <summary>What the source's return path says after SHUT(1) and a record of these bytes.</summary>
    private static string ReasonOf(string json)
    {
        (InMemoryChannel source, InMemoryChannel destination) = InMemoryChannel.CreatePair(4096);
        using (source)
        using (destination)
        {
            var path = new ReturnPathReader(source, new FaultLatch());
            path.Start();
            destination.Write(new StreamBuilder().U16(1).U16(4).U32(1).U16(0x7601).U16((ushort)json.Length).Text(json).ToArray());
            Assert.That(path.WaitEnd(s_deadline), Is.Not.EqualTo(ReturnPathEnd.Open).And.Not.EqualTo(ReturnPathEnd.Confirmed));
            return path.Failure!.Message;
        }
    }
}
