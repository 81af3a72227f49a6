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

var stateSize = new Option<int>("--size") { Description = "Device state in MiB", DefaultValueFactory = static _ => 1024 };
var vfio = new Command("vfio", "Device state from one vfio-user server to another through two VMs, against a plain socket copy") { stateSize, rounds, json };
vfio.SetAction(p => VfioBench.Run(p.GetValue(stateSize), p.GetValue(rounds), p.GetValue(json)));

var socket = new Option<string>("--socket") { Required = true };
var served = new Option<string>("--device") { Required = true };
var serve = new Command("serve", "A device server of the benchmark") { socket, served };
serve.Hidden = true;
serve.SetAction(p => VfioBench.Serve(p.GetValue(socket)!, p.GetValue(served)!));

var file = new Option<string?>("--ram-file");
var device = new Option<string[]>("--device");
var address = new Option<string?>("--address");
var incoming = new Option<bool>("--incoming");
var running = new Option<bool>("--running");
var node = new Command("node", "One end of a measured migration") { size, file, incoming, running, device, address };
node.Hidden = true;
node.SetAction(p => Node.Run((ulong)p.GetValue(size) << 20, p.GetValue(file), p.GetValue(incoming), p.GetValue(running), p.GetValue(device) ?? [], p.GetValue(address)));

var root = new RootCommand("Benchmarks of vmm. Ratios within one run count; absolute figures vary between machines.") { ram, downtime, vfio, node, serve };
return root.Parse(args).Invoke();
