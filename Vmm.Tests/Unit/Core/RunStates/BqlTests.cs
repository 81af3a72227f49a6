using Vmm.Core.RunStates;

namespace Vmm.Tests.Unit.Core.RunStates;

/// <summary>Every test run checks the lock contracts, in release builds as well.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class BqlTests
{
    [Test]
    public void ContractsAreChecked() => Assert.That(Bql.ChecksContracts, "Vmm.Tests.csproj must set Vmm.CheckLocks");

    [Test]
    public void ABrokenContractNamesTheMember()
    {
        var bql = new Bql();
        Assert.That(Broken(() => bql.AssertHeld()), Does.Contain(nameof(ABrokenContractNamesTheMember)).And.Contain("held"));
        Assert.That(Broken(() => bql.AssertNotHeld()), Is.Null);
        using (bql.Acquire())
        {
            bql.AssertHeld();
            Assert.That(Broken(() => bql.AssertNotHeld()), Does.Contain("not held"));
        }
    }

    [Test]
    public void AnotherThreadsLockIsNotTheCallers()
    {
        var bql = new Bql();
        string? broken = null;
        using (bql.Acquire())
        {
            var other = new Thread(() => broken = Broken(() => bql.AssertHeld()));
            other.Start();
            Assert.That(other.Join(TimeSpan.FromSeconds(60)));
        }
        Assert.That(broken, Does.Contain("held"));
    }

    private static string? Broken(Action call)
    {
        try
        {
            call();
            return null;
        }
        catch (InvalidOperationException e)
        {
            return e.Message;
        }
    }
}
