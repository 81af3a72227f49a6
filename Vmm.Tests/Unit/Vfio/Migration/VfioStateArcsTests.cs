using NUnit.Framework;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Tests.Contract;

namespace Vmm.Tests.Unit.Vfio.Migration;

/// <summary>All 8x8 state pairs agree with the table that was measured on kernels (vfio-migration 2).</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class VfioStateArcsTests
{
    [Test]
    public void EveryPairWalksThePathTheKernelWalks([ValueSource(nameof(FlagSets))] int flagSet)
    {
        var flags = (VfioMigrationFlags)flagSet;
        int pairs = 0;
        foreach (VfioDeviceState from in VfioStateArcs.States)
        {
            foreach (VfioDeviceState to in VfioStateArcs.States)
            {
                pairs++;
                IReadOnlyList<VfioDeviceState>? path = VfioStateArcs.Path(from, to, flags);
                Assert.That(path, Is.EqualTo(VfioMigrationTable.Path(from, to, flags)), $"{from} to {to} with {flags}");
            }
        }
        Assert.That(pairs, Is.EqualTo(64));
    }

    [Test]
    public void EveryStateThatExistsIsReachedFromRunningAndLeft([ValueSource(nameof(FlagSets))] int flagSet)
    {
        var flags = (VfioMigrationFlags)flagSet;
        foreach (VfioDeviceState state in VfioStateArcs.States.Where(s => VfioStateArcs.IsSupported(s, flags)))
        {
            Assert.That(VfioStateArcs.Path(VfioDeviceState.Running, state, flags), Is.Not.Null, $"{state}");
            Assert.That(VfioStateArcs.Path(state, VfioDeviceState.Running, flags), Is.Not.Null, $"{state}");
        }
    }

    [Test]
    public void ASessionOpensOnlyOnTheLastArcOfAPath([ValueSource(nameof(FlagSets))] int flagSet)
    {
        var flags = (VfioMigrationFlags)flagSet;
        foreach (VfioDeviceState from in VfioStateArcs.States)
        {
            foreach (VfioDeviceState to in VfioStateArcs.States)
            {
                VfioDeviceState at = from;
                foreach (VfioDeviceState next in VfioStateArcs.Path(from, to, flags) ?? [])
                {
                    if (next != to) Assert.That(VfioStateArcs.OpensData(at, next), Is.False, $"{from} to {to} opens a session at {next}");
                    at = next;
                }
            }
        }
    }

    private static IEnumerable<int> FlagSets() => VfioStateArcs.FlagSets.Select(static f => (int)f);
}
