using System.Text.Json.Nodes;
using Vmm.Tests.Unit.Kvm;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Guests;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

/// <summary>Runs the guest memcheck in separate processes.</summary>
internal abstract class KvmEndToEnd : EndToEnd
{
    /// <summary>Starts a VM with memcheck.</summary>
    protected Task<PeerProcess> Start(string name, params string[] arguments) => StartWith("kvm", name, arguments);

    /// <summary>Starts a VM with memcheck and the accelerator's options.</summary>
    protected Task<PeerProcess> StartWith(string accelerator, string name, params string[] arguments) =>
        Vmm.StartVmOf(name, "3M", ["--accel", accelerator, "--kernel", "builtin:memcheck", "--device", $"serial,output={Vmm["serial"]}", .. arguments]);

    /// <summary>Waits until the guest has passed this number of rounds, and checks that it found no error.</summary>
    protected async Task<MemCheckGuest.Found> Past(PeerProcess vm, ulong rounds)
    {
        DateTime end = DateTime.UtcNow + KvmGuest.Deadline;
        while (DateTime.UtcNow < end)
        {
            MemCheckGuest.Found found = await Read(vm);
            Assert.That((found.Errors, found.BackSteps), Is.EqualTo((0ul, 0ul)));
            if (found.Rounds > rounds) return found;
        }
        Assert.Fail($"the guest did not get past round {rounds}");
        return default;
    }

    /// <summary>Reads what the guest has found so far.</summary>
    protected async Task<MemCheckGuest.Found> Read(PeerProcess vm) => MemCheckGuest.Found.Of(await Memory(vm, MemCheckGuest.StateAddress, MemCheckGuest.StateBytes));

    /// <summary>Reads the stolen time that KVM counts in the guest's memory.</summary>
    protected async Task<ulong> Stolen(PeerProcess vm) => BitConverter.ToUInt64(await Memory(vm, MemCheckGuest.StealAddress, 8));

    /// <summary>Moves the guest live over TCP, ends the source and waits until the guest has done two rounds more.</summary>
    protected async Task<(MemCheckGuest.Found Found, GuestMove Move)> Move(PeerProcess from, string name, PeerProcess to, VcpuDelay delay, double ticksPerMs, ulong rounds)
    {
        int source = VcpuDelay.ThreadOf(from.Pid), destination = VcpuDelay.ThreadOf(to.Pid);
        ulong waitBefore = VcpuDelay.WaitNs(to.Pid, destination), sourceBefore = VcpuDelay.WaitNs(from.Pid, source);
        JsonNode result = JsonNode.Parse(await Vmm.Ok("migrate", "--vm", name, "--to", to.IncomingUri, "--json"))!;
        Assert.That(result["status"]!.ToString(), Is.EqualTo("completed"));
        ulong sourceWait = VcpuDelay.WaitNs(from.Pid, source), stolen = await Stolen(from);
        await Vmm.Ok("quit", "--vm", name);
        MemCheckGuest.Found found = await Past(to, rounds + 2);
        // The source reports completion before the destination does.
        JsonNode there = await Completed(to);
        var move = new GuestMove(found.StopGapTicks / ticksPerMs, found.StopGapNs / 1e6, (GuestAt(there) - GuestAt(result)) / 1e6,
            (double)result[MigrationReport.DowntimeMember]!["total-ms"]!, delay.OnMove(found, (sourceBefore, sourceWait), stolen, waitBefore));
        return (found, move);
    }

    private static long GuestAt(JsonNode answer) => (long)answer[MigrationReport.DowntimeMember]!["guest-at-ns"]!;

    private static async Task<JsonNode> Completed(PeerProcess vm)
    {
        DateTime end = DateTime.UtcNow + KvmGuest.Deadline;
        while (DateTime.UtcNow < end)
            if (await vm.Monitor.Query("query-migrate", CancellationToken.None) is { } answer && answer["status"]?.ToString() == "completed") return answer;
        throw new TimeoutException("the incoming migration does not end");
    }

    private async Task<byte[]> Memory(PeerProcess vm, ulong address, int bytes)
    {
        string file = Vmm["state"];
        await vm.Monitor.Execute("pmemsave", new JsonObject { ["val"] = (long)address, ["size"] = bytes, ["filename"] = file }, CancellationToken.None);
        return await File.ReadAllBytesAsync(file);
    }
}
