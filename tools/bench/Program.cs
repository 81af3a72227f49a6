using System.CommandLine;
using Vmm.Tools.Bench;
using Vmm.Tools.Bench.Micro;
using Vmm.Tools.Bench.Migrate;

var size = new Option<int>("--size") { Description = "RAM in MiB", DefaultValueFactory = static _ => 2048 };
var rounds = new Option<int>("--rounds") { Description = "Paired runs", DefaultValueFactory = static _ => 5 };
var json = new Option<bool>("--json") { Description = "Print JSON only" };
var stateSize = new Option<int>("--size") { Description = "Device state in MiB", DefaultValueFactory = static _ => 1024 };
var vfio = new Command("vfio", "Transfer of device state from one vfio-user server to another through two VMs, compared with a plain socket copy") { stateSize, rounds, json };
vfio.SetAction(p => VfioBench.Run(p.GetValue(stateSize), p.GetValue(rounds), p.GetValue(json)));

var reads = new Option<int>("--reads") { Description = "Number of register reads a round", DefaultValueFactory = static _ => 20_000 };
var piece = new Option<int>("--piece") { Description = "KiB that the device copies at a time", DefaultValueFactory = static _ => 64 };
var deviceBench = new Command("device", "A served device: time of a register read compared with a bare socket, DMA rate compared with memcpy") { rounds, reads, piece, json };
deviceBench.SetAction(p => DeviceBench.Run(p.GetValue(rounds), p.GetValue(reads), p.GetValue(piece), p.GetValue(json)));

var updates = new Option<int>("--updates") { Description = "Number of updates of each kind of VM", DefaultValueFactory = static _ => 25 };
var small = new Option<int>("--small") { Description = "RAM in MiB of the small VM", DefaultValueFactory = static _ => 64 };
var large = new Option<int>("--large") { Description = "RAM in MiB of the large VM", DefaultValueFactory = static _ => 4096 };
var accel = new Option<string>("--accel") { Description = "auto, kvm or none", DefaultValueFactory = static _ => "auto" };
var cpr = new Command("cpr", "Pause of a guest during an update of its VMM, by RAM and devices") { updates, small, large, accel, json };
cpr.SetAction(p => CprBench.Run(p.GetValue(updates), p.GetValue(small), p.GetValue(large), p.GetValue(accel)!, p.GetValue(json)));

var socket = new Option<string>("--socket") { Required = true };
var serveCopy = new Command("serve-copy", "The device of the benchmark 'device'") { socket };
serveCopy.Hidden = true;
serveCopy.SetAction(p => DeviceBench.Serve(p.GetValue(socket)!));
var echo = new Command("echo", "The other end of the bare socket") { socket };
echo.Hidden = true;
echo.SetAction(p => DeviceBench.Echo(p.GetValue(socket)!));
var served = new Option<string>("--device") { Required = true };
var serve = new Command("serve", "A device server of the benchmark 'vfio'") { socket, served };
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

var filter = new Option<string>("--filter") { Description = "Pattern of Class.Method", DefaultValueFactory = static _ => "*" };
var isShort = new Option<bool>("--short") { Description = "Run each once, to see that it works" };
var reports = new Option<string?>("--reports") { Description = "Keep BenchmarkDotNet's reports, JSON among them, in this folder", HelpName = "FOLDER" };
var micro = new Command("micro", "Single functions: zero scan, bitmap harvest, field codec") { filter, isShort, reports };
micro.SetAction(p => MicroBench.Run(p.GetValue(filter)!, p.GetValue(isShort), p.GetValue(reports)));

var root = new RootCommand("Benchmarks of vmm. Ratios within one run count; absolute figures vary between machines.") { MigrateCommand.Build(), micro, vfio, deviceBench, cpr, node, serve, serveCopy, echo };
return root.Parse(args).Invoke();
