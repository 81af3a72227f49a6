namespace Vmm.Tests.Model;

/// <summary>The accept phase, checked in every order of a source's connections and of strays.</summary>
[TestFixture]
public sealed class AcceptModelTests
{
    [Test]
    public void StraysCostNothingAndTheSourcesSetIsLoaded()
    {
        ModelResult result = new AcceptModel().Check();
        TestContext.Out.WriteLine($"accept: {result}");
        Assert.That(result.Broken, Is.Null, () => $"{result}");
        Assert.That(result.States, Is.GreaterThan(500));
    }

    [TestCase(AcceptBug.AnAbortedConnectionIsTheMainOne, "a set is loaded that is not the source's")]
    [TestCase(AcceptBug.ASilentConnectionBlocks, "the source's set is never loaded")]
    [TestCase(AcceptBug.AProbeEndsTheWait, "the destination stopped waiting without a migration")]
    [TestCase(AcceptBug.ChannelsAreOnlyCounted, "a set is loaded that is not the source's")]
    public void ABrokenRuleIsFound(object bug, string expected)
    {
        ModelResult result = new AcceptModel((AcceptBug)bug).Check();
        TestContext.Out.WriteLine($"{bug}: {result}");
        Assert.That(result.Broken, Is.EqualTo(expected));
    }
}
