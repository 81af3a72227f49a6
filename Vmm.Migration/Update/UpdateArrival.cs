using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Cpr;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.Engine;
using Vmm.Migration.Status;

namespace Vmm.Migration.Update;

/// <summary>
/// The new process's side of an update. Call in order: <see cref="TakeFromEnvironment"/>; <see cref="Receive"/>; make the VM with the received
/// <see cref="VmOptions.Cpr"/> and with <see cref="VmOptions.IsIncoming"/>; <see cref="LoadAsync"/>. A host that opens the channels itself calls
/// <see cref="ReportListening"/> and <see cref="ReportRunning"/> instead of Receive and LoadAsync. For one thread at a time.
/// </summary>
public sealed class UpdateArrival : IDisposable
{
    private readonly UpdateTicket? _ticket;
    private readonly OldProcess? _old;
    private CprTransferReceiver? _receiver;

    /// <summary>Makes an arrival that the host learns of by its own means, not by the environment; it sends no reports to the old process.</summary>
    /// <param name="oldPid">The process that has the VM.</param>
    public UpdateArrival(int oldPid)
    {
        OldPid = oldPid;
        if (oldPid != Environment.ProcessId) _old = new OldProcess(oldPid);
    }

    private UpdateArrival(UpdateTicket ticket)
        : this(ticket.Channels.OldPid) => _ticket = ticket;

    /// <summary>The pid of the process that has the VM; with exec that is this process.</summary>
    public int OldPid { get; }

    /// <summary>CLOCK_MONOTONIC, ns: when the VM stopped in the program that this one replaced. 0 if the VM did not run, or without exec.</summary>
    public long StoppedAtNs => _ticket?.StoppedAtNs ?? 0;

    /// <summary>Fires once the old process has ended and its last bytes have had time to arrive; never with exec.</summary>
    public CancellationToken OldEnded => _old?.Ended ?? CancellationToken.None;

    /// <summary>Reads and removes the environment variable that the old process has set.</summary>
    /// <returns>The arrival; null if this process was not started for an update.</returns>
    /// <exception cref="ConfigurationException">The variable does not describe an update.</exception>
    public static UpdateArrival? TakeFromEnvironment()
    {
        string? text = Environment.GetEnvironmentVariable(UpdateTicket.Variable);
        if (text is null) return null;
        Environment.SetEnvironmentVariable(UpdateTicket.Variable, null);
        var ticket = UpdateTicket.Parse(text);
        // A child that was started just before an exec has inherited a variable that is not for it.
        return ticket.Channels.Cpr is null && ticket.Channels.OldPid != Environment.ProcessId ? null : new UpdateArrival(ticket);
    }

    /// <summary>
    /// Takes over what the program that this one has replaced left behind (mode cpr-exec, QEMU: <c>cpr_state_load</c>). For hosts that run without
    /// <see cref="TakeFromEnvironment"/>; <see cref="Receive"/> does it for the others.
    /// </summary>
    /// <returns>The descriptors; goes to <see cref="VmOptions.Cpr"/>. Null when this process has replaced nobody.</returns>
    /// <exception cref="VmmException">What was left is not a CPR state.</exception>
    public static CprIncoming? TakeCprExecState() => CprExec.TakeFromEnvironment();

    /// <summary>Takes the descriptors of RAM and devices; blocks until the old process has sent them.</summary>
    /// <param name="cancel">Ends the wait.</param>
    /// <returns>The descriptors, for <see cref="VmOptions.Cpr"/>. The old process waits until <see cref="LoadAsync"/> has begun.</returns>
    /// <exception cref="OperationCanceledException"><paramref name="cancel"/> fired, or the old process has ended.</exception>
    /// <exception cref="VmmException">The process cannot listen on the channel, or the received bytes are no CPR state.</exception>
    /// <exception cref="InvalidOperationException">The arrival was not taken from the environment.</exception>
    public CprIncoming Receive(CancellationToken cancel = default)
    {
        UpdateChannels channels = Ticket().Channels;
        if (channels.Cpr is null)
            return CprExec.TakeFromEnvironment() ?? throw new ConfigurationException($"{CprExec.StateVariable} is not set: this process did not replace itself by cpr-exec");
        using var limit = CancellationTokenSource.CreateLinkedTokenSource(cancel, OldEnded);
        _receiver = CprTransferReceiver.Receive(channels.Cpr, limit.Token, ReportListening);
        return _receiver.Incoming;
    }

    /// <summary>Loads the VM's state and reports to the old process. Afterwards the VM runs here if it ran there.</summary>
    /// <param name="vm">The VM, in state inmigrate.</param>
    /// <param name="cancel">Ends the wait.</param>
    /// <exception cref="MigrationFailedException">The state did not arrive or could not be loaded; the old process still has the VM.</exception>
    /// <exception cref="VmmException">The VM does not wait for a migration, or cannot listen on the channel; the old process still has the VM.</exception>
    /// <exception cref="InvalidOperationException">The arrival was not taken from the environment.</exception>
    public async Task LoadAsync(Vm vm, CancellationToken cancel = default)
    {
        ArgumentNullException.ThrowIfNull(vm);
        UpdateTicket ticket = Ticket();
        IMigrationEngine engine = vm.Services.GetRequiredService<IMigrationEngine>();
        Task<MigrationStatus> loading = engine.MigrateIncoming(ticket.Channels.Main);
        // Closing this channel lets the old process send the stream.
        _receiver?.Dispose();
        using (cancel.Register(engine.Cancel))
        using (OldEnded.Register(() =>
        {
            // A stream that has begun may be complete; if it is not, the load fails by itself.
            if (engine.Status == MigrationStatus.Setup) engine.Cancel();
        }))
        {
            MigrationStatus end = await loading.ConfigureAwait(false);
            if (end != MigrationStatus.Completed || vm.RunState.State == RunState.InMigrate)
                throw new MigrationFailedException($"update: the VM of process {OldPid} has not arrived: {engine.Query().Error?.ToString() ?? end.ToWireName()}");
        }
        if (ticket.Channels.Cpr is null) File.Delete(ticket.Channels.Main.Path);
        if (ticket.RemoveDirectory is { } directory) Directory.Delete(directory, recursive: true);
        ReportRunning(engine.Query().Downtime?.AtNs ?? 0);
    }

    /// <summary>Tells the old process that this one accepts descriptors on the CPR channel.</summary>
    public void ReportListening()
    {
        if (_ticket?.ReportPath is { } path) UpdateReports.SendListening(path);
    }

    /// <summary>Tells the old process that the VM runs here, which ends the update.</summary>
    /// <param name="runningAtNs">When the VM started here; CLOCK_MONOTONIC, ns.</param>
    public void ReportRunning(long runningAtNs)
    {
        if (_ticket?.ReportPath is { } path) UpdateReports.SendRunning(path, runningAtNs);
    }

    /// <summary>Stops watching the old process and closes the CPR channel.</summary>
    public void Dispose()
    {
        _receiver?.Dispose();
        _old?.Dispose();
    }

    private UpdateTicket Ticket() => _ticket ?? throw new InvalidOperationException("this arrival has no ticket: the host opens the channels itself");
}
