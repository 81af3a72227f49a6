using System.Net.Sockets;
using System.Text;
using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Cpr;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Migration;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.Engine;
using Vmm.Migration.Qmp;
using Vmm.Migration.Status;
using Vmm.Migration.Update;
using Vmm.Tools.Cli.Registry;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tools.Cli.Hosting;

/// <summary><c>vmm run</c>: one VM with its QMP socket, until quit or a signal.</summary>
internal sealed class RunCommand(CliContext context, RunOptions options, bool verbose)
{
    /// <summary>A UNIX socket's path has 107 bytes, and the longest name in a rehearsal is that of <c>PID.try.dev</c>.</summary>
    private const int MaxRehearsalPathBytes = 107 - 20;

    private readonly TaskCompletionSource<ExitCode> _end = new(TaskCreationOptions.RunContinuationsAsynchronously);

    private bool CanDoWithoutKvm => options is { HasWorkload: true, Vm.Accelerator: "auto" };

    public async Task<ExitCode> Run()
    {
        using UpdateArrival? told = UpdateArrival.TakeFromEnvironment();
        if (told is { IsTrial: true }) return await Try(told);
        if (options.Vm.Devices.Any(static d => d.TypeName == "help")) return ListDevices();
        long memoryBytes = (long)options.Vm.Memory.Aggregate(0UL, static (sum, b) => sum + b.SizeBytes);
        var directory = VmDirectory.Open(context.GetVariable);
        CprIncoming? inherited = UpdateArrival.TakeCprExecState();
        bool isTold = told is not null && told.OldPid == (options.Replaces ?? Environment.ProcessId);
        using UpdateArrival? untold = !isTold && options.Replaces is { } old ? new UpdateArrival(old) : null;
        UpdateArrival? arrival = isTold ? told : untold;
        using VmRegistration registration = directory.Register(options.Vm.Name, options.QmpPath, memoryBytes, options.Replaces, isAgain: inherited is not null);
        await using ServiceProvider services = VmHost.Build(verbose,
            options.SnapshotDirectory ?? VmHost.DefaultSnapshotDirectory(context.GetVariable, options.Vm.Name), Rehearsal(directory));
        // Who waits for a VM has the time, and the VM then stands still for less.
        bool waits = options.Replaces is not null || options.Incoming is { IsSocket: true };
        if (waits) await services.RehearseMoveAsync(options.Vm);
        if (inherited is not null && options.Cpr is not null) context.Note("the cpr channel is not used: this process has replaced itself");
        using CprTransferReceiver? cpr = options.Cpr is null || inherited is not null ? null : Receive(options.Cpr, arrival);
        using Vm vm = CreateVm(services, inherited ?? cpr?.Incoming);
        using QmpServer server = vm.Services.GetRequiredService<QmpServer>();
        server.Listen(registration.ListenPath);
        server.UpdateOptions = request => CommandLineUpdate.Describe(request, context.CommandLine, directory, registration);
        if (registration.Replaces is not null || inherited is not null) TakeOverWhenHere(vm, server, registration, arrival);
        if (cpr is not null) CloseOnceListening(cpr, vm.Migration());
        string incoming = StartIncoming(vm, registration, arrival);
        if (arrival is not null) EndWithout(arrival, vm);
        // An old process that was killed has left its files behind.
        using CancellationTokenRegistration cleaning = arrival?.OldEnded.Register(() => RemoveLeftovers(directory)) ?? default;
        if (!options.Vm.IsIncoming && options.Vm.AutoStart) vm.Cont();
        context.Note($"ready: pid {Environment.ProcessId}, qmp {registration.Entry.QmpPath}{incoming}");
        // Rehearse while the guest starts: the first stop otherwise takes long, mostly to save the vCPUs' state.
        Task rehearsing = waits || inherited is not null || vm.Accelerator is null ? Task.CompletedTask : services.RehearseMoveAsync(options.Vm);
        try
        {
            return await WaitForEnd(server);
        }
        finally
        {
            await rehearsing;
        }
    }

    private async Task<ExitCode> WaitForEnd(QmpServer server)
    {
        using CancellationTokenRegistration signal = context.Interrupted.Register(() =>
        {
            server.Shutdown("host-signal");
            _end.TrySetResult(ExitCode.Ok);
        });
        if (await Task.WhenAny(server.QuitRequested, _end.Task) != server.QuitRequested) return await _end.Task;
        (int ExitCode, string? Reason) quit = await server.QuitRequested;
        if (quit.Reason is not null) context.Note(quit.Reason);
        return (ExitCode)quit.ExitCode;
    }

    private ExitCode ListDevices()
    {
        using ServiceProvider services = VmHost.Build(verbose: false);
        Format.WriteTable(context.Out, [.. services.GetServices<IDeviceFactory>().OrderBy(static f => f.TypeName, StringComparer.Ordinal)
            .Select(static f => (string[])[f.TypeName, f.Summary])]);
        return ExitCode.Ok;
    }

    /// <summary>
    /// Proves to a process that is about to replace itself by this program that the program can load its VM. The options were parsed before.
    /// </summary>
    private async Task<ExitCode> Try(UpdateArrival trial)
    {
        await using ServiceProvider services = VmHost.Build(verbose, rehearsal: Rehearsal(VmDirectory.Open(context.GetVariable)));
        VmOptions vm = options.Vm with { Devices = [.. options.Vm.Devices.Where(static d => d.TypeName != "help")] };
        string? problem = await trial.TryAsync(services, vm);
        // As for the VM itself, a workload does without KVM.
        if (problem is not null && CanDoWithoutKvm) problem = await trial.TryAsync(services, vm with { Accelerator = "none", Kernel = null });
        if (problem is not null) throw new CliException(ExitCode.Failed, $"this program cannot take the VM: {problem}");
        return ExitCode.Ok;
    }

    private MoveRehearsalOptions Rehearsal(VmDirectory directory) => new()
    {
        CreateStandIn = static (real, socketPath) => new VmmStandIn(real, socketPath),
        // The socket of its device needs a short path (null: a folder in the temporary directory).
        Directory = Encoding.UTF8.GetByteCount(directory.DirectoryPath) <= MaxRehearsalPathBytes ? directory.DirectoryPath : null,
        Failed = problem => context.Note($"the rehearsal of a move failed, so a move may stop the guest for longer: {problem}"),
    };

    /// <summary>Takes the VM's name and socket over once the VM is here. Until then the old process needs them, because it may have to continue.</summary>
    private void TakeOverWhenHere(Vm vm, QmpServer server, VmRegistration registration, UpdateArrival? arrival)
    {
        int taken = 0;
        vm.Migration().StatusChanged += status =>
        {
            if (status == MigrationStatus.Completed && vm.Migration().Query().IsIncoming && Interlocked.Exchange(ref taken, 1) == 0) TakeOver(vm, server, registration, arrival);
        };
        // A VM that was held is here once an operator has started it; not on this thread, which has the BQL.
        vm.RunState.Changed += (_, to) =>
        {
            if (to == RunState.Running && vm.Migration() is { Status: MigrationStatus.Failed } engine && engine.Query().IsIncoming && Interlocked.Exchange(ref taken, 1) == 0)
                Task.Run(() => TakeOver(vm, server, registration, arrival));
        };
    }

    private void TakeOver(Vm vm, QmpServer server, VmRegistration registration, UpdateArrival? arrival)
    {
        MigrationInfo info = vm.Migration().Query();
        // Nobody else needs the stream file of a process that has replaced itself.
        if (registration.Replaces is null && options.Incoming is { Transport: MigrationTransport.File } file) Try("its state stays", () => File.Delete(file.Path));
        string listens = registration.ListenPath, place = registration.Entry.QmpPath;
        if (listens != place && Try($"its QMP socket stays at '{listens}'", () => server.MoveListener(listens, place))) listens = place;
        long runningAtNs = info.Downtime?.AtNs ?? 0;
        if (!Try($"it is not in the VM directory, its QMP socket is '{listens}'", () => registration.TakeOver(runningAtNs, listens, arrival?.StoppedAtNs ?? 0))) return;
        arrival?.ReportRunning(runningAtNs);
        context.Note($"update: the VM of process {registration.Replaces ?? Environment.ProcessId} runs here, pid {Environment.ProcessId}");
    }

    /// <summary>Runs a step of the take-over and only reports its failure, because the guest runs here already.</summary>
    private bool Try(string otherwise, Action action)
    {
        try
        {
            action();
            return true;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or SocketException or VmmException or CliException)
        {
            context.Note($"update: the VM runs here, pid {Environment.ProcessId}, but {otherwise}: {e.Message}");
            return false;
        }
    }

    private CprTransferReceiver Receive(MigrationAddress address, UpdateArrival? arrival)
    {
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(context.Interrupted, arrival?.OldEnded ?? CancellationToken.None);
        try
        {
            return CprTransferReceiver.Receive(address, limit.Token, arrival is null ? null : arrival.ReportListening);
        }
        catch (OperationCanceledException e) when (arrival is { OldEnded.IsCancellationRequested: true })
        {
            throw new CliException(ExitCode.Failed, Gone(arrival), e);
        }
    }

    /// <summary>
    /// Closes the CPR channel when the main channel can be reached. The old process waits for that; with <c>--incoming defer</c> an operator gives the address later.
    /// </summary>
    private static void CloseOnceListening(CprTransferReceiver cpr, IMigrationEngine engine) => engine.StatusChanged += status =>
    {
        if (status == MigrationStatus.Setup) cpr.Dispose();
    };

    private void EndWithout(UpdateArrival arrival, Vm vm)
    {
        IMigrationEngine engine = vm.Migration();
        void Look(MigrationStatus status)
        {
            // A stream that has begun may be complete; if it is not, the load fails by itself.
            bool waits = status == MigrationStatus.Setup || status.IsTerminal();
            if (!arrival.OldEnded.IsCancellationRequested || !waits || vm.RunState.State != RunState.InMigrate) return;
            context.Note(Gone(arrival));
            _end.TrySetResult(ExitCode.Failed);
        }

        engine.StatusChanged += Look;
        arrival.OldEnded.Register(() => Look(engine.Status));
    }

    private static void RemoveLeftovers(VmDirectory directory)
    {
        try
        {
            directory.RemoveLeftovers();
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // The next vmm that looks into the directory removes them.
        }
    }

    private static string Gone(UpdateArrival arrival) => $"process {arrival.OldPid} has ended, and its VM has not arrived";

    private Vm CreateVm(ServiceProvider services, CprIncoming? cpr)
    {
        VmFactory factory = services.GetRequiredService<VmFactory>();
        CprIncoming? again = CanDoWithoutKvm ? cpr?.Duplicate() : null;
        try
        {
            Vm vm = factory.Create(options.Vm with { Cpr = cpr });
            again?.Dispose();
            return vm;
        }
        catch (KvmException e) when (CanDoWithoutKvm)
        {
            context.Note($"no guest runs, only the --workload: {VmmException.Describe(e)}");
            return factory.Create(options.Vm with { Cpr = again, Accelerator = "none", Kernel = null });
        }
        catch (ConfigurationException e)
        {
            bool lacksProgram = options.Vm is { HasCpus: true, Kernel: null, IsIncoming: false };
            throw new CliException(ExitCode.Usage, VmmException.Describe(e), e) { Hint = e.Hint ?? (lacksProgram ? "--kernel gives the guest a program, --incoming waits for a guest" : null) };
        }
        catch (KvmException e)
        {
            throw new CliException(ExitCode.Failed, VmmException.Describe(e), e) { Hint = e.Hint is null ? null : $"{e.Hint}: --accel none, and a --workload instead of a --kernel" };
        }
    }

    private string StartIncoming(Vm vm, VmRegistration registration, UpdateArrival? arrival)
    {
        // With a deferred address the QMP command says what a failure means, unless the VM can have no other attempt.
        if (options.Incoming is null && !vm.CprFds.IsIncoming) return string.Empty;
        IMigrationEngine engine = vm.Migration();
        engine.StatusChanged += status =>
        {
            bool inherited = vm.CprFds.IsIncoming;
            if (status is not (MigrationStatus.Failed or MigrationStatus.Cancelled)) return;
            if (vm.RunState.State != RunState.InMigrate)
            {
                // The source has released the VM, or may have, so the VM here is kept.
                if (engine.Query() is { IsIncoming: true, Error: { } error })
                    context.Note($"the VM has arrived and is {vm.RunState.State.ToWireName()}, qmp {registration.ListenPath}: {error}");
                if (vm.HeldBecause is not null) arrival?.ReportHeld();
                return;
            }
            if (status == MigrationStatus.Cancelled && !inherited) return;
            // Only a socket can bring another attempt. A VM whose RAM and devices came by descriptor must not wait either: they belong to the other
            // process again, and another attempt needs a new process.
            bool waits = options.Incoming is { IsSocket: true } && !inherited;
            context.Note($"incoming migration failed: {engine.Query().Error?.ToString() ?? "cancelled"}{(waits ? "; waiting for another" : string.Empty)}");
            if (!waits) _end.TrySetResult(ExitCode.Failed);
        };
        if (options.Incoming is not { } address) return string.Empty;
        _ = engine.MigrateIncoming(address, keepListening: !vm.CprFds.IsIncoming);
        return $", incoming {(engine.Query().SocketAddresses is [var at, ..] ? at : address)}";
    }
}
