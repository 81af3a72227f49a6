using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Tests.Contract;

/// <summary>The state table of vfio-migration 2, typed in by hand, so that the tests do not judge a device by the product's own table.</summary>
internal static class VfioMigrationTable
{
    private const string Letters = "RrPpSCU";

    private static readonly string[][] s_paths =
    [
        [".", "r", "P", "rp", "rS", "rSC", "rSU"],
        ["R", ".", "RP", "p", "S", "SC", "SU"],
        ["R", "Rr", ".", "p", "RrS", "pC", "RrSU"],
        ["rR", "r", "P", ".", "rS", "C", "rSU"],
        ["rR", "r", "rRP", "rp", ".", "C", "U"],
        ["SrR", "Sr", "X", "X", "S", ".", "SU"],
        ["SrR", "Sr", "SrRP", "Srp", "S", "SC", "."],
    ];

    private static readonly VfioDeviceState[] s_states =
    [
        VfioDeviceState.Running, VfioDeviceState.RunningP2P, VfioDeviceState.PreCopy, VfioDeviceState.PreCopyP2P, VfioDeviceState.Stop, VfioDeviceState.StopCopy, VfioDeviceState.Resuming,
    ];

    /// <summary>All 56 requests: each of seven start states with each of eight target states.</summary>
    internal static IEnumerable<TestCaseData> Requests =>
        from start in s_states
        from target in s_states.Append(VfioDeviceState.Error)
        select new TestCaseData(start, target);

    internal static bool Has(VfioDeviceState state, VfioMigrationFlags flags) =>
        (state is not (VfioDeviceState.RunningP2P or VfioDeviceState.PreCopyP2P) || (flags & VfioMigrationFlags.P2P) != 0)
        && (state is not (VfioDeviceState.PreCopy or VfioDeviceState.PreCopyP2P) || (flags & VfioMigrationFlags.PreCopy) != 0)
        && state != VfioDeviceState.Error;

    /// <summary>The states that the device enters, the target last: empty when it is in the target already, null when it must refuse.</summary>
    internal static VfioDeviceState[]? Path(VfioDeviceState start, VfioDeviceState target, VfioMigrationFlags flags)
    {
        if (!Has(start, flags) || !Has(target, flags)) return null;
        string cell = s_paths[Array.IndexOf(s_states, start)][Array.IndexOf(s_states, target)];
        if (cell == "X") return null;
        return cell == "." ? [] : [.. cell.Select(static c => s_states[Letters.IndexOf(c, StringComparison.Ordinal)]).Where(s => Has(s, flags))];
    }

    /// <summary>Whether the last step of a path opens a data session.</summary>
    internal static bool OpensData(VfioDeviceState start, VfioDeviceState[] path)
    {
        if (path.Length == 0) return false;
        VfioDeviceState before = path.Length > 1 ? path[^2] : start, last = path[^1];
        return last == VfioDeviceState.Resuming || (IsSaving(last) && !IsSaving(before));
    }

    internal static bool IsSaving(VfioDeviceState state) => state is VfioDeviceState.PreCopy or VfioDeviceState.PreCopyP2P or VfioDeviceState.StopCopy;
}
