using System.CommandLine;

namespace Vmm.Tools.Bench.Migrate;

/// <summary>The command <c>migrate</c>.</summary>
internal static class MigrateCommand
{
    internal static Command Build()
    {
        Argument<string[]> names = new("SCENARIO") { Description = "Scenarios or groups of scenarios; 'all' is every one", Arity = ArgumentArity.ZeroOrMore };
        Option<int> pairs = new("--pairs") { Description = "Number of pairs: vmm, then the peer, in each", DefaultValueFactory = static _ => 5 };
        Option<int> size = new("--size") { Description = "RAM in MiB, where the scenario does not say", DefaultValueFactory = static _ => 2048 };
        Option<string?> json = new("--json") { Description = "Write all runs and figures to this file", HelpName = "FILE" };
        Option<string?> svg = new("--svg") { Description = "Then watch one more run of the first scenario, and draw throughput and remaining bytes over time", HelpName = "FILE" };
        Option<string?> vmm = new("--vmm") { Description = "The measured program; default: the vmm beside this program", HelpName = "PATH" };
        Option<string?> peer = new("--peer") { Description = "What it is compared with: a QEMU, or another vmm; 'none' for nothing; default $VMM_QEMU_111", HelpName = "PATH" };
        Option<string[]> set = new("--set") { Description = "Set a migration parameter of vmm, both ends", HelpName = "parameter=value" };
        Option<string[]> capability = new("--capability") { Description = "Set a capability of vmm, both ends; NAME! clears it", HelpName = "NAME" };
        Option<string[]> peerSet = new("--peer-set") { Description = "The same as --set for the peer", HelpName = "parameter=value" };
        Option<string[]> peerCapability = new("--peer-capability") { Description = "The same as --capability for the peer", HelpName = "NAME" };
        Option<bool> noLoopback = new("--no-loopback") { Description = "Do not measure iperf3" };
        string help = $"""
            Live migration between two processes of vmm, paired with two of QEMU: total time, CPU time and downtime. RAM of all ends is a preallocated shared file
            in /dev/shm, the way is TCP over the loopback, and after each run the RAM of both ends is compared. Scenarios by group:

            {string.Join('\n', Scenarios.All.Select(static s => $"  {s.Group,-12} {s.Name,-15} {s.Summary}"))}
            """;
        var command = new Command("migrate", help) { names, pairs, size, json, svg, vmm, peer, set, capability, peerSet, peerCapability, noLoopback };
        command.SetAction(p =>
        {
            string? other = p.GetValue(peer) ?? Environment.GetEnvironmentVariable("VMM_QEMU_111");
            return MigrateBench.Run(new MigrateBenchOptions
            {
                Names = p.GetValue(names) ?? [], Pairs = p.GetValue(pairs), SizeMiB = p.GetValue(size),
                JsonPath = p.GetValue(json), SvgPath = p.GetValue(svg), HasLoopback = !p.GetValue(noLoopback),
                Vmm = With(Peer.At("vmm", p.GetValue(vmm) ?? Path.Combine(AppContext.BaseDirectory, "vmm")), p.GetValue(set), p.GetValue(capability)),
                Peer = string.IsNullOrEmpty(other) || other == "none" ? null
                    : With(Peer.At(Path.GetFileName(other) == "vmm" ? "other vmm" : "QEMU", other), p.GetValue(peerSet), p.GetValue(peerCapability)),
            });
        });
        return command;
    }

    private static Peer With(Peer peer, string[]? parameters, string[]? capabilities) => peer with
    {
        Capabilities = capabilities ?? [],
        Parameters = [.. (parameters ?? []).Select(static t =>
            t.Split('=', 2) is [var name, var value] ? KeyValuePair.Create(name, value) : throw new ArgumentException($"'{t}' is not parameter=value"))],
    };
}
