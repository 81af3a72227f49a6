using System.Text.Json.Nodes;

namespace Vmm.Tests.Faults;

/// <summary>The guest of the runs: a workload that writes numbered pages and checks each one before it writes it again, and in VMs with devices one that drives edu.</summary>
internal static class Guest
{
    internal const string Uuid = "6b0d5d4a-7c7b-4f0e-9a59-30c2f5b0e111";
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(15);

    /// <summary>Arguments of <c>vmm run</c> for the guest.</summary>
    /// <param name="kind">A VM of this kind has devices or not.</param>
    /// <param name="arrives">True where RAM must already hold the guest when it starts.</param>
    internal static IEnumerable<string> Arguments(AttemptKind kind, bool arrives) =>
    [
        "--uuid", Uuid, .. kind == AttemptKind.Device ? (string[])["--memory", "1M,id=edu"] : [], "--memory", $"{AttemptPlan.RamBytes >> 20}M,id=ram",
        "--workload", $"pattern,block=ram,rate=4M,prefill=on,state=on{(arrives ? ",expect=on" : "")}",
    ];

    /// <summary>Counts of the workload; null if the VM does not answer.</summary>
    internal static async Task<JsonObject?> Verify(FaultVm vm) => await vm.Ask("__io.github.vmm_workload-verify", deadlineMs: 15_000) as JsonObject;

    /// <summary>Waits until the guest of a new VM has written all RAM once.</summary>
    internal static async Task Filled(FaultVm vm)
    {
        using var limit = new CancellationTokenSource(s_deadline);
        while ((await Verify(vm))?["writes"]?.GetValue<long>() is not > (long)(AttemptPlan.RamBytes / 4096 * 9 / 10))
        {
            limit.Token.ThrowIfCancellationRequested();
            await vm.Changed(5);
        }
    }

    /// <summary>Checks a VM whose guest runs: no lost, stale or torn page, nothing older than before, and it goes on.</summary>
    /// <param name="vm">The VM.</param>
    /// <param name="writes">The least number of writes that it must have.</param>
    /// <returns>What is wrong, or null.</returns>
    internal static async Task<string?> Check(FaultVm vm, long writes)
    {
        if (await Verify(vm) is not { } first) return $"{vm.Name}: the guest's pages cannot be verified";
        if (Wrong(vm, first, writes) is { } wrong) return wrong;
        long now = first["writes"]!.GetValue<long>();
        using var limit = new CancellationTokenSource(s_deadline);
        while (true)
        {
            if (await Verify(vm) is not { } later) return $"{vm.Name}: the VM answers no more";
            if (later["writes"]!.GetValue<long>() > now) return Wrong(vm, later, now);
            if (limit.IsCancellationRequested) return $"{vm.Name}: the guest stands still at {now} writes, state {await vm.State()}";
            await vm.Changed(5);
        }
    }

    /// <summary>Checks the edu guest: no wrong page, and its interrupts still come.</summary>
    internal static async Task<string?> CheckDevice(FaultVm vm, string file)
    {
        long[] first = await EduWords(vm, file);
        if (first.Length == 0) return $"{vm.Name}: the edu guest's words cannot be read";
        using var limit = new CancellationTokenSource(s_deadline);
        while (true)
        {
            long[] now = await EduWords(vm, file);
            if (now.Length > 0 && now[1] != 0) return $"{vm.Name}: edu returned wrong data in {now[1]} pages";
            if (now.Length > 0 && now[0] > first[0] + 5) return null;
            if (limit.IsCancellationRequested) return $"{vm.Name}: an interrupt of edu was lost, its guest stands at step {first[0]}, state {await vm.State()}";
            await vm.Changed(5);
        }
    }

    private static string? Wrong(FaultVm vm, JsonObject verified, long writes)
    {
        long Count(string name) => verified[name]!.GetValue<long>();
        if (Count("pages-checked") != (long)(AttemptPlan.RamBytes / 4096)) return $"{vm.Name}: RAM was lost whole: {verified.ToJsonString()}";
        if (Count("bad-pages") != 0 || Count("violations") != 0) return $"{vm.Name}: wrong pages: {verified.ToJsonString()}";
        return Count("writes") < writes ? $"{vm.Name}: an old state: {Count("writes")} writes, {writes} were done before" : null;
    }

    private static async Task<long[]> EduWords(FaultVm vm, string file)
    {
        if (await vm.Ask("pmemsave", new JsonObject { ["val"] = 0, ["size"] = 16, ["filename"] = file }) is null) return [];
        byte[] bytes = await File.ReadAllBytesAsync(file);
        return bytes.Length < 16 ? [] : [BitConverter.ToInt64(bytes, 0), BitConverter.ToInt64(bytes, 8)];
    }
}
