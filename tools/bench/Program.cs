using System.CommandLine;
using Vmm.Tools.Bench;

var size = new Option<int>("--size") { Description = "RAM in MiB", DefaultValueFactory = static _ => 2048 };
var rounds = new Option<int>("--rounds") { Description = "Paired runs", DefaultValueFactory = static _ => 5 };
var qemu = new Option<string?>("--qemu") { Description = "QEMU binary; default $VMM_QEMU_111" };
var json = new Option<bool>("--json") { Description = "Print JSON only" };
var ram = new Command("ram", "RAM throughput and CPU time over loopback TCP, one channel, paired with QEMU in one run") { size, rounds, qemu, json };
ram.SetAction(p => RamBench.Run(p.GetValue(size), p.GetValue(rounds), p.GetValue(qemu) ?? Environment.GetEnvironmentVariable("VMM_QEMU_111"), p.GetValue(json)));
var downtime = new Command("downtime", "Downtime of an idle running VM over loopback TCP") { size, rounds, json };
downtime.SetAction(p => RamBench.Downtime(p.GetValue(size), p.GetValue(rounds), p.GetValue(json)));

var file = new Option<string?>("--ram-file");
var incoming = new Option<bool>("--incoming");
var running = new Option<bool>("--running");
var node = new Command("node", "One end of a measured migration") { size, file, incoming, running };
node.Hidden = true;
node.SetAction(p => Node.Run((ulong)p.GetValue(size) << 20, p.GetValue(file), p.GetValue(incoming), p.GetValue(running)));

var root = new RootCommand("Benchmarks of vmm. Ratios within one run count; absolute figures vary between machines.") { ram, downtime, node };
return root.Parse(args).Invoke();
