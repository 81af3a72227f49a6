using System.CommandLine;
using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.VmStates;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Demo;
using Vmm.Tools.Cli.Devices;
using Vmm.Tools.Cli.Hosting;
using Vmm.Tools.Cli.Migrate;
using Vmm.Tools.Cli.Shell;
using Vmm.Tools.Cli.Snapshots;
using Vmm.Tools.Cli.Streams;
using Vmm.Tools.Cli.Vfio;

namespace Vmm.Tools.Cli;

/// <summary>Defines all commands and maps exceptions to exit codes.</summary>
internal sealed class CliRoot
{
    private const string Description = """
        A VM monitor core whose machines move: to another process, to a file and back, over QEMU's own migration stream.

        Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 the operation failed, 2 wrong usage, 3 refused by the VM (blocked,
        another migration, wrong state), 4 peer not reachable (VM or destination), 124 timed out, 130 cancelled (Ctrl-C).
        """;

    private readonly CliContext _context;
    private readonly Option<bool> _verbose = new("--verbose", "-v") { Description = "Log to stderr", Recursive = true };
    private readonly Option<string?> _vm = new("--vm") { Description = "The VM, by name or pid; not needed if only one runs", HelpName = "NAME|PID" };
    private readonly Option<string?> _qmp = new("--qmp") { Description = "The VM, by its QMP socket; works for QEMU too", HelpName = "PATH" };
    private readonly Option<bool> _json = new("--json") { Description = "Print the result as JSON" };

    private CliRoot(CliContext context) => _context = context;

    /// <summary>Runs a command line.</summary>
    public static async Task<int> Invoke(IReadOnlyList<string> arguments, CliContext context)
    {
        var cli = new CliRoot(context);
        ParseResult parsed = cli.Build().Parse(arguments, new ParserConfiguration { ResponseFileTokenReplacer = null });
        if (parsed.Action is System.CommandLine.Invocation.ParseErrorAction || (parsed.Errors.Count > 0 && parsed.Action is null))
        {
            string command = string.Join(' ', Path(parsed.CommandResult));
            // An unknown word also causes the error of a missing command, so report the unknown word first.
            string message = parsed.Errors.Select(static e => e.Message).OrderByDescending(static m => m.StartsWith("Unrecognized", StringComparison.Ordinal)).First();
            return cli.Report(CliException.Usage(Sentence(message), $"'{command} --help' lists the commands and options"));
        }
        var configuration = new InvocationConfiguration
        {
            Output = context.Out, Error = context.Error, EnableDefaultExceptionHandler = false,
            // The context handles Ctrl-C: the default would end the process before a cancelled migration has settled.
            ProcessTerminationTimeout = null,
        };
        try
        {
            return await parsed.InvokeAsync(configuration);
        }
        catch (Exception e) when (cli.ToCli(e) is { } known)
        {
            return cli.Report(known);
        }
    }

    private RootCommand Build()
    {
        var root = new RootCommand(Description) { _verbose };
        root.Add(Run());
        root.Add(Migrate());
        root.Add(Snapshot("savevm", "Save a snapshot of the VM; it stops meanwhile and goes on afterwards", static (c, name, json) => c.Save(name, json)));
        root.Add(Snapshot("loadvm", "Put the VM into the state of a snapshot; one that turns out to be bad leaves the VM as it was", static (c, name, json) => c.Load(name, json)));
        root.Add(Snapshot("delvm", "Delete a snapshot", static (c, name, json) => c.Delete(name, json)));
        root.Add(Json("snapshots", "List the VM's snapshots", (target, json) => new SnapshotCommands(_context, target).List(json)));
        root.Add(Json("status", "Show the state of the VM and of its migration", (target, json) => new SimpleCommands(_context, target).Status(json)));
        root.Add(Plain("stop", "Stop the guest", static c => c.Stop()));
        root.Add(Cont());
        root.Add(Plain("cancel", "Cancel the VM's migration and wait until it has ended", static c => c.Cancel()));
        root.Add(Update());
        root.Add(Plain("quit", "End the VM", static c => c.Quit()));
        root.Add(List());
        root.Add(Stream());
        root.Add(VmState());
        root.Add(Vfio());
        root.Add(Device());
        root.Add(Demo());
        return root;
    }

    private Command Run()
    {
        Option<string?> name = new("--name") { Description = "Name for --vm, unique among this user's VMs", HelpName = "NAME" };
        Option<string> machine = new("--machine", "-M") { Description = "Machine type", HelpName = "none", DefaultValueFactory = static _ => "none" };
        Option<string> accel = new("--accel")
        {
            Description = "What runs the guest; auto uses KVM for a --kernel, or runs only the --workload where KVM is missing", HelpName = "auto|kvm|none", DefaultValueFactory = static _ => "auto",
        };
        Option<string?> kernel = new("--kernel") { Description = "Program of the guest: flat binary, ELF, Linux bzImage, or a built-in guest", HelpName = "FILE|builtin:memcheck|builtin:devcheck|builtin:busy|builtin:smp" };
        Option<string?> initrd = new("--initrd") { Description = "Linux initial RAM disk", HelpName = "FILE" };
        Option<string> append = new("--append") { Description = "Command line of the kernel", HelpName = "TEXT", DefaultValueFactory = static _ => "" };
        Option<int> cpus = new("--cpus", "--smp") { Description = "Number of vCPUs", HelpName = "N", DefaultValueFactory = static _ => 1 };
        Option<string?> uuid = new("--uuid") { Description = "UUID of the VM", HelpName = "UUID" };
        Option<string[]> memory = new("--memory", "-m")
        {
            Description = "A RAM block, 128M by default; repeat for more. Blocks are named ram, ram1, ram2 and so on unless id= names them. "
                + "share=on (default) maps MAP_SHARED; file= with share=off never writes to the file",
            HelpName = "SIZE[,id=NAME][,file=PATH][,share=on|off][,prealloc=on|off][,hugepages=on|off]",
        };
        Option<string[]> workload = new("--workload") { Description = "Code that dirties and verifies RAM in place of a guest", HelpName = "pattern[,rate=BYTES/s][,seed=N]..." };
        Option<string[]> device = new("--device") { Description = "A device; repeat for more; 'help' lists the types", HelpName = "TYPE[,key=value]..." };
        Option<int?> replaces = new("--replaces") { Hidden = true };
        Option<string[]> incoming = new("--incoming")
        {
            Description = "Wait for a migration at tcp:HOST:PORT (port 0 chooses a free port), unix:PATH, fd:N, exec:COMMAND or file:PATH; defer waits for QMP's migrate-incoming; "
                + "JSON gives a QMP channel. A second --incoming with channel-type cpr receives the RAM and devices of a process on this host",
            HelpName = "URI|defer|JSON",
        };
        Option<bool> paused = new("--paused", "-S") { Description = "Do not start the guest" };
        Option<bool> onlyMigratable = new("--only-migratable") { Description = "Refuse devices that cannot migrate" };
        Option<string?> qmp = new("--qmp") { Description = "Path of the QMP socket; the default is in the VM directory", HelpName = "PATH" };
        Option<string?> snapshots = new("--snapshot-dir") { Description = "Directory of the snapshots; by default one per VM name under $XDG_STATE_HOME/vmm/snapshots", HelpName = "DIR" };
        var command = new Command("run", "Run a VM until QMP's quit, Ctrl-C or SIGTERM")
        {
            name, machine, accel, kernel, initrd, append, cpus, memory, workload, device, incoming, paused, onlyMigratable, qmp, snapshots, uuid, replaces,
        };
        command.SetAction((p, _) => Code(() => new RunCommand(_context, RunOptions.Parse(new RunOptions.Texts
        {
            Cpr = RunOptions.SplitIncoming(p.GetValue(incoming) ?? []).Cpr, Replaces = p.GetValue(replaces), Name = p.GetValue(name), Machine = p.GetValue(machine)!, Accel = p.GetValue(accel)!, Uuid = p.GetValue(uuid), Memory = p.GetValue(memory) ?? [],
            Workload = p.GetValue(workload) ?? [], Device = p.GetValue(device) ?? [], Incoming = RunOptions.SplitIncoming(p.GetValue(incoming) ?? []).Main, Paused = p.GetValue(paused), OnlyMigratable = p.GetValue(onlyMigratable),
            Qmp = p.GetValue(qmp), SnapshotDir = p.GetValue(snapshots), Kernel = p.GetValue(kernel), Initrd = p.GetValue(initrd), Append = p.GetValue(append)!,
            Cpus = p.GetValue(cpus),
        }), p.GetValue(_verbose)).Run()));
        return command;
    }

    private Command Migrate()
    {
        Option<string> to = new("--to") { Description = "tcp:HOST:PORT, unix:PATH, fd:NAME, exec:COMMAND or file:PATH[,offset=N]", HelpName = "URI", Required = true };
        Option<string[]> set = new("--set")
        {
            Description = "Set a migration parameter by QEMU's name, e.g. max-bandwidth=1G or downtime-limit=50; sizes are in bytes or have the suffix K, M, G or T; repeat for more",
            HelpName = "parameter=value",
        };
        Option<string[]> capability = new("--capability")
        {
            Description = "Switch a migration capability by QEMU's name; return-path is on for tcp and unix unless this switches it off; repeat for more",
            HelpName = "name[=on|off]",
        };
        Option<bool> detach = new("--detach", "-d") { Description = "Return once the migration has started" };
        Option<bool> check = new("--check") { Description = "Only check whether the migration could start" };
        Option<double?> timeout = new("--timeout") { Description = "Cancel the migration after this time, with exit code 124", HelpName = "SECONDS" };
        var command = new Command("migrate", "Migrate the VM; Ctrl-C cancels, and the VM goes on here") { to, _vm, _qmp, set, capability, detach, check, timeout, _json };
        command.SetAction((p, _) => Code(() =>
        {
            if (p.GetValue(detach) && p.GetValue(check)) throw CliException.Usage("--detach and --check exclude each other");
            if (p.GetValue(detach) && p.GetValue(timeout) is not null) throw CliException.Usage("--detach and --timeout exclude each other");
            MigrateOptions options = MigrateOptions.Parse(p.GetValue(to)!, p.GetValue(set) ?? [], p.GetValue(capability) ?? [], p.GetValue(timeout));
            return new MigrateCommand(_context, options, Target(p)) { Detach = p.GetValue(detach), CheckOnly = p.GetValue(check), Json = p.GetValue(_json) }.Run();
        }));
        return command;
    }

    private Command Update()
    {
        Option<string?> binary = new("--to-binary") { Description = "The new program; by default the VM's own as it is on disk now", HelpName = "PATH" };
        Option<bool> exec = new("--exec") { Description = "Let the process replace itself and keep its pid, instead of starting a second one. A trial of the program comes first, because the process cannot go back" };
        Option<double> timeout = new("--timeout") { Description = "Time limit for the new process", HelpName = "SECONDS", DefaultValueFactory = static _ => 30 };
        var command = new Command("update", "Move the running VM into a new vmm process; RAM and devices stay in place. If the new process fails, the VM continues in the old one")
        {
            _vm, _qmp, binary, exec, timeout, _json,
        };
        command.SetAction((p, _) => Code(() => new UpdateCommand(_context, Target(p))
        {
            Binary = p.GetValue(binary), Exec = p.GetValue(exec), Timeout = TimeSpan.FromSeconds(p.GetValue(timeout)), Json = p.GetValue(_json),
        }.Run()));
        return command;
    }

    private Command Snapshot(string verb, string help, Func<SnapshotCommands, string, bool, Task<ExitCode>> run)
    {
        Argument<string> name = new("NAME") { Description = "The snapshot's name: letters, digits, '-', '_' and '.'" };
        var command = new Command(verb, help) { name, _vm, _qmp, _json };
        command.SetAction((p, _) => Code(() => run(new SnapshotCommands(_context, Target(p)), p.GetValue(name)!, p.GetValue(_json))));
        return command;
    }

    private Command Json(string verb, string help, Func<VmTarget, bool, Task<ExitCode>> run)
    {
        var command = new Command(verb, help) { _vm, _qmp, _json };
        command.SetAction((p, _) => Code(() => run(Target(p), p.GetValue(_json))));
        return command;
    }

    private Command Plain(string verb, string help, Func<SimpleCommands, Task<ExitCode>> run)
    {
        var command = new Command(verb, help) { _vm, _qmp };
        command.SetAction((p, _) => Code(() => run(new SimpleCommands(_context, Target(p)))));
        return command;
    }

    private Command Cont()
    {
        Option<bool> force = new("--force") { Description = "Start a VM that is held because the other side of a migration may run it; you know that it does not" };
        var command = new Command("cont", "Start the guest, or continue a migration that waits before its switchover") { _vm, _qmp, force };
        command.SetAction((p, _) => Code(() => new SimpleCommands(_context, Target(p)).Cont(p.GetValue(force))));
        return command;
    }

    private Command List()
    {
        var command = new Command("list", "List this user's running VMs") { _json };
        command.SetAction((p, _) => Code(() => SimpleCommands.List(_context, p.GetValue(_json))));
        return command;
    }

    private Command Stream()
    {
        Argument<string> file = new("FILE") { Description = "A migration stream or VM state of QEMU or vmm, of any machine type" };
        Option<bool> pages = new("--pages") { Description = "List every page record" };
        var show = new Command("show", "Print what a stream holds: sections, values, commands, RAM per block") { file, pages, _json };
        show.SetAction((p, _) => Code(() => Task.FromResult(new StreamCommands(_context).Show(p.GetValue(file)!, p.GetValue(pages), p.GetValue(_json)))));
        var check = new Command("check", "Report what breaks the format and where; exit code 1 if something does") { file, _json };
        check.SetAction((p, _) => Code(() => Task.FromResult(new StreamCommands(_context).Check(p.GetValue(file)!, p.GetValue(_json)))));
        return new Command("stream", "Read a stream file without a VM") { show, check };
    }

    private Command VmState()
    {
        var dump = new Command("dump", "Print the layout of every device's state as JSON, in the format of QEMU's -dump-vmstate");
        dump.SetAction((_, _) => Code(async () =>
        {
            await using ServiceProvider services = VmHost.Build(verbose: false);
            await _context.Out.WriteAsync(VmStateDump.Write("none", services.GetServices<IDeviceFactory>()
                .OrderBy(static f => f.TypeName, StringComparer.Ordinal).SelectMany(static f => f.Descriptions, static (f, d) => (f.TypeName, d))));
            return ExitCode.Ok;
        }));
        return new Command("vmstate", "Describe the state of devices in a stream") { dump };
    }

    private Command Vfio()
    {
        Argument<string?> device = new("DEVICE")
        {
            Description = "A PCI address, a mediated device's UUID, or the device's folder in sysfs. The probe opens the device, which may reset it",
            Arity = ArgumentArity.ZeroOrOne,
        };
        var probe = new Command("probe", "List IOMMU groups, devices and drivers; or for one device its regions, interrupts, migration support, and what blocks migration") { device, _json };
        probe.SetAction((p, _) => Code(() => Task.FromResult(new VfioCommands(_context).Probe(p.GetValue(device), p.GetValue(_json)))));
        return new Command("vfio", "Show the VFIO support of this host") { probe };
    }

    private Command Device()
    {
        Option<string[]> type = new("--type") { Description = "The device to serve; repeat for more, each with a --socket", HelpName = "TYPE[,key=value]...", Required = true };
        Option<string[]> socket = new("--socket") { Description = "Path of the device's UNIX socket", HelpName = "PATH", Required = true };
        Option<bool> once = new("--once") { Description = "End after the first client" };
        var serve = new Command("serve", "Serve devices over vfio-user until Ctrl-C or SIGTERM, each to one VMM at a time") { type, socket, once };
        serve.SetAction((p, _) => Code(() => new DeviceCommands(_context).Serve(p.GetValue(type)!, p.GetValue(socket)!, p.GetValue(once), p.GetValue(_verbose))));
        var list = new Command("list", "List the devices that can be served") { _json };
        list.SetAction((p, _) => Code(() => Task.FromResult(new DeviceCommands(_context).List(p.GetValue(_json)))));
        return new Command("device", "Serve devices from a process of their own") { serve, list };
    }

    private Command Demo()
    {
        var command = new Command("demo", "Migrate a busy 512 MiB VM live to another process and to QEMU, and verify every page");
        command.SetAction((_, _) => Code(() => new DemoCommand(_context).Run()));
        return command;
    }

    private VmTarget Target(ParseResult parsed) => new(parsed.GetValue(_vm), parsed.GetValue(_qmp));

    private static async Task<int> Code(Func<Task<ExitCode>> run) => (int)await run();

    private int Report(CliException error)
    {
        _context.Note(error.Hint is null ? error.Message : $"{error.Message} ({error.Hint})");
        return (int)error.Code;
    }

    private CliException? ToCli(Exception error) => error switch
    {
        CliException e => e,
        OperationCanceledException when _context.Interrupted.IsCancellationRequested => new CliException(ExitCode.Cancelled, "cancelled"),
        MonitorException e => new CliException(ExitCode.Failed, e.Message, e),
        ConfigurationException e => new CliException(ExitCode.Usage, VmmException.Describe(e), e) { Hint = e.Hint },
        MigrationBlockedException or DeviceNotActiveException => new CliException(ExitCode.Refused, VmmException.Describe(error), error),
        VmmException e => new CliException(ExitCode.Failed, VmmException.Describe(e), e) { Hint = e.Hint },
        IOException or UnauthorizedAccessException => new CliException(ExitCode.Failed, VmmException.Describe(error), error),
        _ => null,
    };

    private static IEnumerable<string> Path(System.CommandLine.Parsing.CommandResult command)
    {
        IEnumerable<string> parents = command.Parent is System.CommandLine.Parsing.CommandResult parent ? Path(parent) : [];
        return parents.Append(command.Parent is null ? "vmm" : command.Command.Name);
    }

    private static string Sentence(string message) => message.ReplaceLineEndings(" ").Trim().TrimEnd('.');
}
