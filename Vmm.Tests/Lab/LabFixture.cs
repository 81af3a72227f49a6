namespace Vmm.Tests.Lab;

/// <summary>What all lab tests share: real devices of a real kernel, in the small VM that <c>tools/lab/lab test</c> boots. Elsewhere they are skipped.</summary>
[Category(Category)]
[NonParallelizable]
public abstract class LabFixture
{
    internal const string Category = "lab";

    /// <summary>Tests of minutes, which only a filter that names them runs.</summary>
    internal const string Slow = "slow";

    [OneTimeSetUp]
    public void IsInTheLab() => Need();

    /// <summary>For fixtures that have another base.</summary>
    internal static void Need()
    {
        if (Environment.GetEnvironmentVariable("VMM_LAB") is null) Assert.Ignore("needs real VFIO devices: run tools/lab/lab test");
    }
}
