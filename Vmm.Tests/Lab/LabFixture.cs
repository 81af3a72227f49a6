namespace Vmm.Tests.Lab;

/// <summary>Base of all lab tests. They need real devices of a real kernel, so they run only in the small VM that <c>tools/lab/lab test</c> boots.</summary>
[Category(Category)]
[NonParallelizable]
public abstract class LabFixture
{
    internal const string Category = "lab";

    /// <summary>The category of tests that take minutes. Only a filter that names such a test runs it.</summary>
    internal const string Slow = "slow";

    [OneTimeSetUp]
    public void IsInTheLab() => Need();

    /// <summary>Skips the test outside the lab. Fixtures with another base class call it themselves.</summary>
    internal static void Need()
    {
        if (Environment.GetEnvironmentVariable("VMM_LAB") is null) Assert.Ignore("needs real VFIO devices: run tools/lab/lab test");
    }
}
