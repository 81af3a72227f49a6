using NUnit.Framework;
using Vmm.Devices.Vfio.Io;
using Vmm.Devices.Vfio.Migration;

namespace Vmm.Tests.Unit.Vfio.Migration;

/// <summary>All 8x8 pairs against the table that was measured on kernels (spec vfio-migration 2).</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class VfioStateArcsTests
{
    private const string Letters = "xSRCUrPp"; // indexed by the enum's value

    // Rows and columns R r P p S C U; '.' there already, X invalid.
    private static readonly string[][] s_full =
    [
        [".", "r", "P", "rp", "rS", "rSC", "rSU"],
        ["R", ".", "RP", "p", "S", "SC", "SU"],
        ["R", "Rr", ".", "p", "RrS", "pC", "RrSU"],
        ["rR", "r", "P", ".", "rS", "C", "rSU"],
        ["rR", "r", "rRP", "rp", ".", "C", "U"],
        ["SrR", "Sr", "X", "X", "S", ".", "SU"],
        ["SrR", "Sr", "SrRP", "Srp", "S", "SC", "."],
    ];

    [Test]
    public void EveryPairWalksThePathTheKernelWalks([ValueSource(nameof(FlagSets))] int flagSet)
    {
        var flags = (VfioMigrationFlags)flagSet;
        const string order = "RrPpSCU";
        int pairs = 0;
        foreach (VfioDeviceState from in VfioStateArcs.States)
        {
            foreach (VfioDeviceState to in VfioStateArcs.States)
            {
                pairs++;
                string? expected = "X";
                int row = order.IndexOf(Letter(from), StringComparison.Ordinal), column = order.IndexOf(Letter(to), StringComparison.Ordinal);
                if (row >= 0 && column >= 0 && VfioStateArcs.IsSupported(from, flags) && VfioStateArcs.IsSupported(to, flags))
                    expected = Reduce(s_full[row][column], to, flags);
                IReadOnlyList<VfioDeviceState>? path = VfioStateArcs.Path(from, to, flags);
                string found = path is null ? "X" : path.Count == 0 ? "." : string.Concat(path.Select(Letter));
                Assert.That(found, Is.EqualTo(expected), $"{from} to {to} with {flags}");
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

    private static char Letter(VfioDeviceState state) => Letters[(int)state];

    private static string Reduce(string path, VfioDeviceState to, VfioMigrationFlags flags)
    {
        if (path is "." or "X") return path;
        // Without a capability its states are not on the way; the target itself is there, as the caller checked.
        return string.Concat(path[..^1].Where(c => VfioStateArcs.IsSupported((VfioDeviceState)Letters.IndexOf(c, StringComparison.Ordinal), flags))) + Letter(to);
    }
}
