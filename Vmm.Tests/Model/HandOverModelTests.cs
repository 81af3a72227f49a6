namespace Vmm.Tests.Model;

/// <summary>The hand-over, checked in every order of messages, losses, deadlines, operators and crashes, in two attempts in a row (STREAM.md, the hand-over).</summary>
[TestFixture]
public sealed class HandOverModelTests
{
    [TestCase(Peers.Vmm, false)]
    [TestCase(Peers.Vmm, true)]
    [TestCase(Peers.QemuDestination, false)]
    public void ExactlyOneSideHasTheVmInEveryState(object peers, bool hasRelay)
    {
        ModelResult result = Check((Peers)peers, hasRelay);
        Assert.That(result.Broken, Is.Null, () => $"{result}");
        Assert.That(result.States, Is.GreaterThan(3_000));
    }

    /// <summary>
    /// What no rule of ours can mend, because QEMU says too little: a relay that dies with QEMU's confirmation looks like a QEMU that closed before it confirmed,
    /// and a QEMU source that is cancelled behind the last byte goes on without an answer.
    /// </summary>
    [TestCase(Peers.QemuDestination, true, "the source sees the relay's end")]
    [TestCase(Peers.QemuSource, false, "cancel at source")]
    public void WithQemuTwoWaysToTwoRunningSidesAreLeft(object peers, bool hasRelay, string by)
    {
        ModelResult result = Check((Peers)peers, hasRelay);
        Assert.That(result.Broken, Is.EqualTo("both sides run"));
        if ((Peers)peers == Peers.QemuDestination) Assert.That(result.Trace, Does.Contain(by));
        else Assert.That(result.Trace, Has.Some.StartsWith("source").Or.Some.EqualTo(by));
    }

    private static ModelResult Check(Peers peers, bool hasRelay, HandOverBug bug = HandOverBug.None)
    {
        ModelResult result = new HandOverModel(new HandOverSetting(peers, hasRelay, bug)).Check();
        TestContext.Out.WriteLine($"{peers}, {(hasRelay ? "through a relay" : "direct")}, {bug}: {result}");
        return result;
    }

    /// <summary>A check that finds nothing wrong with a wrong rule would prove nothing about the right one.</summary>
    [TestCase(HandOverBug.HeldIsResetWhenSilent, Peers.Vmm, false, "neither side can ever run")]
    [TestCase(HandOverBug.HeldIsResetWhenSilent, Peers.QemuSource, false, "neither side can ever run")]
    [TestCase(HandOverBug.HeldIsResetWhenLost, Peers.Vmm, false, "neither side can ever run")]
    [TestCase(HandOverBug.RunsOnDelivery, Peers.Vmm, true, "both sides run")]
    [TestCase(HandOverBug.GoesOnWhenLost, Peers.QemuDestination, false, "both sides run")]
    [TestCase(HandOverBug.GoesOnWhenSilent, Peers.QemuDestination, false, "both sides run")]
    [TestCase(HandOverBug.CancelsWithoutAsking, Peers.QemuDestination, false, "both sides run")]
    [TestCase(HandOverBug.StopsBeforeAnswer, Peers.Vmm, false, "the guest is stopped for a destination that has not answered")]
    [TestCase(HandOverBug.SourceWaitsForEver, Peers.Vmm, false, "a side waits for ever")]
    [TestCase(HandOverBug.DestinationWaitsForEver, Peers.Vmm, false, "a side waits for ever")]
    [TestCase(HandOverBug.ConfirmsWithoutCheck, Peers.Vmm, false, "neither side can ever run")]
    [TestCase(HandOverBug.GoesOnWhenWordIsLost, Peers.Vmm, false, "both sides run")]
    public void ABrokenRuleIsFound(object bug, object peers, bool hasRelay, string expected)
    {
        ModelResult result = Check((Peers)peers, hasRelay, (HandOverBug)bug);
        Assert.That(result.Broken, Is.EqualTo(expected), () => $"{result}");
        Assert.That(result.Trace, Is.Not.Empty);
    }
}
